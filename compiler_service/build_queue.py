"""The build queue: what is to be built, who builds it, and how far it is. Its keys in Redis:

    pattern                type        content                                     lifetime
    builds                 stream      waiting and running work, field `digests`;  an entry: until
                                       group `workers` from id 0                   its builds ended
    builds:index           sorted set  digest by time of asking; 10,000 at most    7 days unused
    build:{digest}         hash        the record of a build, see `BuildRecord`    7 days unchanged
    build:{digest}:events  stream      one entry a change, about 64 at most:       as its record
                                       wakes watchers, who then read the record

One entry holds the builds of one request that nobody builds yet. They differ in arch alone, so they
share weights, and one worker builds them one after the other: the second adopts the weights of the
first. A lease is the entry's place in the group's pending list, kept fresh by heartbeats
(`XCLAIM … JUSTID`) and taken over by `XAUTOCLAIM` when they stop. Losing Redis loses no engine:
waiting builds are asked for again, running ones are registered anew by their workers.
"""

import base64
import json
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import redis.exceptions
import structlog
from google.rpc import status_pb2
from redis.asyncio import Redis

from compiler_service import build_scripts
from compiler_service.build_record import (
    BuildJob,
    BuildRecord,
    events_key,
    progress_fields,
    read_record,
    record_key,
)
from compiler_service.event_tail import EventTail
from compiler_service.progress import BuildProgress
from shared.errors import (
    BuildNotFound,
    BuildQueueFull,
)
from shared.redis import MAX_BLOCK_S, Records, reachable

BUILDS = "builds"
INDEX = "builds:index"
GROUP = "workers"
KEPT_S = 7 * 24 * 3600
KEPT = "7 days"
MAX_ATTEMPTS = 3

_FORGOTTEN_WORKER_MS = 3_600_000

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to work on one entry, as long as its heartbeat goes on."""

    entry: str
    digests: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try to make one engine. `is_lost`: too many were lost before it; it may only fail."""

    digest: str
    job: BuildJob
    fence: int
    number: int
    is_lost: bool
    last_stage: str


class Fenced(Exception):
    """This worker no longer has the right to the build: another one does, or it has ended."""


class BuildQueue:
    """The queue that all compile daemons of a Redis share; any number of readers and workers.

    Every method raises RedisUnreachable where Redis does not answer; all may be called again.

    Args:
        client: not closed here.
        url: of that client, for messages.
        lease_s: how long a silent worker is believed to live.
        max_queued: entries that may wait for a worker.
    """

    def __init__(self, client: Redis, url: str, lease_s: float, max_queued: int) -> None:
        # redis-py's types cannot say that replies are decoded.
        self._redis: Any = client
        self._records = Records(client, read_record)
        self._url = url
        self.lease_s = lease_s
        self._max_queued = max_queued
        self._script = {
            name: client.register_script(getattr(build_scripts, name))
            for name in (
                "ENQUEUE", "START", "BEAT", "FINISH", "GIVE_BACK", "CLOSE", "LEAVE",
                "CANCEL", "FORGET_WORKERS",
            )
        }  # fmt: skip

    async def enqueue(self, jobs: Sequence[BuildJob]) -> None:
        """Has `jobs`, which differ in arch alone, built; those that are being built are joined.

        Raises:
            BuildQueueFull: too many wait; none of the jobs was taken.
        """
        keys = [BUILDS, *(record_key(job.key.digest) for job in jobs)]
        pairs = [text for job in jobs for text in (job.key.digest, job.to_json())]
        reply = await self._run("ENQUEUE", keys, [self._max_queued, KEPT_S, *pairs])
        if reply[0] == "full":
            raise BuildQueueFull(queued=reply[1], max_queued=self._max_queued)

    async def record(self, digest: str) -> BuildRecord | None:
        """The build as it stands; None where there is no record of it."""
        return (await self._found([digest])).get(record_key(digest))

    async def watch(self, digest: str) -> AsyncIterator[BuildRecord]:
        """The build as it stands, then at every change, up to and with its end.

        Raises:
            BuildNotFound: there is no record of it, or it is gone.
        """
        tail = self.tail([events_key(digest)])
        await tail.start()
        is_known = False
        while True:
            record = await self.record(digest)
            if record is None and not is_known:
                raise BuildNotFound(build=f"builds/{digest}", kept=KEPT)
            is_known = record is not None
            if record is None:  # Redis lost its data; the worker, if there is one, tells it soon
                await tail.wait(self.lease_s)
                continue
            yield record
            if record.is_ended:
                return
            await tail.wait()

    def tail(self, keys: Sequence[str]) -> EventTail:
        """What will be new in the event streams at `keys`."""
        return EventTail(self._redis, self._url, keys)

    async def cancel(self, digest: str) -> None:
        """Ends a build that has not ended: at once if it waits, at the next heartbeat if it runs.

        Raises:
            BuildNotFound: there is no record of it.
        """
        if not await self._run("CANCEL", [BUILDS, record_key(digest)], [KEPT_S]):
            raise BuildNotFound(build=f"builds/{digest}", kept=KEPT)

    async def page(self, size: int, before: int | None) -> tuple[list[BuildRecord], int | None]:
        """Builds, newest first, and where the next page begins; None after the last.

        Args:
            before: what the page before gave; None for the first page.
        """
        records: list[BuildRecord] = []
        while True:
            highest = "+inf" if before is None else f"({before}"
            async with reachable(self._url):
                rows: list[tuple[str, float]] = await self._redis.zrange(
                    INDEX, highest, "-inf", desc=True, byscore=True, withscores=True,
                    offset=0, num=size - len(records) + 1,
                )  # fmt: skip
            found = await self._found([digest for digest, _ in rows])
            for digest, score in rows:
                if len(records) == size:
                    return records, before
                before = int(score)
                record = found.get(record_key(digest))
                if record is not None:  # else its record has expired before its row
                    records.append(record)
            if not rows:
                return records, None

    async def num_waiting(self) -> int:
        """Entries that wait for a worker."""
        async with reachable(self._url):
            length = int(await self._redis.xlen(BUILDS))
            try:
                pending = await self._redis.xpending(BUILDS, GROUP)
            except redis.exceptions.ResponseError as error:
                if "NOGROUP" not in str(error):  # expected before the first build was asked for
                    raise
                return length
        return length - int(pending["pending"])

    async def lease(self, owner: str) -> Lease | None:
        """The next entry to work on, a lost worker's first; None where none came for a while.

        Args:
            owner: the worker's name, unique among all that ever were.
        """
        await self._run("FORGET_WORKERS", [BUILDS], [_FORGOTTEN_WORKER_MS])
        lease_ms = round(self.lease_s * 1000)
        block_ms = min(round(lease_ms / 3), round(MAX_BLOCK_S * 1000))
        async with reachable(self._url):
            try:
                found = await self._claim_lost(owner, lease_ms)
                if not found:
                    streams = await self._redis.xreadgroup(
                        GROUP, owner, {BUILDS: ">"}, count=1, block=block_ms
                    )
                    found = [entry for _, entries in streams for entry in entries]
            except redis.exceptions.ResponseError as error:
                # Redis lost its data this moment; the next call makes the group again.
                if not str(error).startswith(("NOGROUP", "UNBLOCKED")):
                    raise
                return None
        for entry, fields in found:
            if fields and fields.get("digests"):
                return Lease(entry, tuple(fields["digests"].split(",")))
            _log.warning("build_entry_passed_over", entry=entry)
            await self.close(owner, Lease(entry, ()))
        return None

    async def start(self, owner: str, lease: Lease, digest: str) -> Attempt | None:
        """An attempt at one build of a lease; None where nothing of it is left to do.

        Raises:
            Fenced: the lease is another worker's.
        """
        reply = await self._run(
            "START",
            [BUILDS, record_key(digest)],
            [owner, lease.entry, round(self.lease_s * 1000), MAX_ATTEMPTS, KEPT_S],
        )
        if reply[0] == "ended":
            return None
        if reply[0] in ("busy", "refused"):
            raise Fenced
        verdict, fence, number, job, stage = reply
        return Attempt(
            digest, BuildJob.from_json(job), int(fence), int(number), verdict == "lost", stage
        )

    async def beat(
        self, owner: str, attempt: Attempt, progress: BuildProgress | None = None
    ) -> bool:
        """Keeps the lease, and tells progress; True if the build is to be cancelled.

        Raises:
            Fenced: the attempt is over, whatever it has done.
        """
        reply = await self._say("BEAT", owner, attempt, progress_fields(progress))
        if reply == "refused":
            raise Fenced
        return bool(reply == "cancel")

    async def finish(
        self,
        owner: str,
        attempt: Attempt,
        state: str,
        error: status_pb2.Status | None = None,
        stage_timings: Iterable[tuple[str, float]] = (),
    ) -> bool:
        """Ends the build. False: it was to be cancelled but asked for again; give it back.

        Raises:
            Fenced: the attempt is over, whatever it has done.
        """
        fields = ["stage_timings", json.dumps(list(stage_timings))]
        if error is not None:
            fields += ["error", base64.b64encode(error.SerializeToString()).decode()]
        reply = await self._say("FINISH", owner, attempt, [state, *fields])
        if reply == "refused":
            raise Fenced
        return bool(reply == "ok")

    async def give_back(self, owner: str, attempt: Attempt) -> None:
        """Returns a running build to the queue, which may have lost it; the attempt does not count.

        Raises:
            Fenced: the attempt is over.
        """
        if await self._say("GIVE_BACK", owner, attempt) == "refused":
            raise Fenced

    async def close(self, owner: str, lease: Lease) -> None:
        """Ends a lease whose builds have all ended; a no-op where it is lost."""
        await self._run("CLOSE", [BUILDS], [owner, lease.entry])

    async def leave(self, owner: str) -> None:
        """Frees all that a worker holds, and forgets it."""
        await self._run("LEAVE", [BUILDS], [owner])

    async def _found(self, digests: Sequence[str]) -> dict[str, BuildRecord]:
        """Records of builds, by key."""
        async with reachable(self._url):
            return await self._records.read([record_key(digest) for digest in digests])

    async def _claim_lost(self, owner: str, lease_ms: int) -> Any:
        """The first entry whose worker is silent, if there is one.

        One call looks at ten entries for each that it may claim, and says where to go on.
        """
        cursor = "0-0"
        while True:
            reply = await self._redis.xautoclaim(
                BUILDS, GROUP, owner, lease_ms, start_id=cursor, count=1
            )
            cursor, found = reply[:2]
            if found or cursor == "0-0":
                return found

    async def _say(
        self, script: str, owner: str, attempt: Attempt, more: Sequence[object] = ()
    ) -> Any:
        """What a worker says of its attempt: all that a Redis which lost its data needs to know of the build."""
        known = [attempt.digest, attempt.job.to_json(), attempt.number]
        keys = [BUILDS, record_key(attempt.digest)]
        return await self._run(script, keys, [owner, attempt.fence, KEPT_S, *known, *more])

    async def _run(self, script: str, keys: Sequence[str], args: Sequence[Any]) -> Any:
        async with reachable(self._url):
            return await self._script[script](keys=list(keys), args=list(args))
