"""The worker: takes one lease at a time from the queue and runs its builds, each in a child.

Redis may go away and come back at any moment: the child goes on, and what is to be told is told
later. A worker that was taken for lost finds out at its next heartbeat and ends its child.
"""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from google.rpc import status_pb2

from compiler_service.build_process import BuildProcess
from compiler_service.build_queue import MAX_ATTEMPTS, Attempt, BuildQueue, Fenced, Lease
from compiler_service.build_record import CANCELLED, FAILED, SUCCEEDED
from compiler_service.metrics import CompilerMetrics
from compiler_service.progress import BuildProgress
from shared.errors import Internal, RedisUnreachable, WorkerLost, reason_of, to_status
from shared.log import canonical_line
from shared.tracing import Span, start_span, trace_fields

_RETRY_S = 0.5
_MAX_BEAT_S = 0.5  # also how often progress is told and a cancel is noticed


@dataclass(frozen=True, slots=True)
class BuildStore:
    """Where builds put engines.

    Args:
        url: as `open_store` knows it.
        local: folder in which they are built for a store elsewhere.
        local_bytes: what that folder may keep of them; 0: all.
    """

    url: str
    local: Path
    local_bytes: int = 0


class Worker:
    """Builds until it is cancelled; then returns what it holds, uncounted.

    Args:
        owner: unique among all workers that ever were.
        command: starts a build child.
        store: where the engines go.
        cache_dir: folder that keeps what builds know of files.
    """

    def __init__(
        self,
        queue: BuildQueue,
        owner: str,
        command: Sequence[str],
        store: BuildStore,
        cache_dir: Path,
        metrics: CompilerMetrics,
    ) -> None:
        self._queue, self._owner = queue, owner
        self._command, self._store, self._cache_dir = command, store, cache_dir
        self._metrics = metrics
        self._beat_s = min(queue.lease_s / 3, _MAX_BEAT_S)
        self._is_reachable = True
        self._log = structlog.get_logger()

    async def run(self) -> None:
        """Works until cancelled."""
        try:
            while True:
                try:
                    lease = await self._queue.lease(self._owner)
                    self._note_redis(None)
                    if lease is not None:
                        await self._work(lease)
                except RedisUnreachable as error:
                    self._note_redis(error)
                    await asyncio.sleep(_RETRY_S)
                except Fenced:
                    pass  # the lease is another worker's, who does the rest
                except Exception:
                    self._log.exception("worker_failed_unforeseen")
                    await asyncio.sleep(_RETRY_S)
        finally:
            await self._leave()

    async def _leave(self) -> None:
        try:
            await self._queue.leave(self._owner)
        except RedisUnreachable as error:  # then its leases run out by themselves
            self._note_redis(error)

    def _note_redis(self, error: RedisUnreachable | None) -> None:
        """Logs that Redis was lost, or found again; not each of many tries in between."""
        if error is not None and self._is_reachable:
            self._log.warning("redis_unreachable", error=str(error))
        if error is None and not self._is_reachable:
            self._log.info("redis_found")
        self._is_reachable = error is None

    async def _work(self, lease: Lease) -> None:
        for digest in lease.digests:
            while (attempt := await self._queue.start(self._owner, lease, digest)) is not None:
                if await self._attempt(attempt):
                    break
        await self._queue.close(self._owner, lease)

    async def _attempt(self, attempt: Attempt) -> bool:
        """Whether the build has ended; else it is to be started again."""
        key = attempt.job.key
        span = start_span(
            f"build {attempt.job.model}",
            kind="consumer",
            parent=attempt.job.traceparent,
            attributes={
                "millrace.build": attempt.digest,
                "millrace.arch": key.arch,
                "millrace.quant": str(key.quant),
                "millrace.attempt": attempt.number,
            },
        )
        with (
            structlog.contextvars.bound_contextvars(build=attempt.digest, **trace_fields(span)),
            canonical_line("build_attempt_ended", attempt=attempt.number) as line,
        ):
            line.update(model=attempt.job.model, arch=key.arch, quant=str(key.quant))
            line["outcome"] = "drained"
            self._metrics.running.inc()
            try:
                return await self._build(attempt, line, span)
            except Fenced:
                line["outcome"] = "fenced"
                raise
            finally:
                self._metrics.running.dec()
                self._metrics.ended.labels(line["outcome"], key.arch).inc()
                outcome = str(line["outcome"])
                failure = "" if outcome in (SUCCEEDED, CANCELLED) else line.get("reason", outcome)
                span.end(failure, {"millrace.outcome": outcome})

    async def _build(self, attempt: Attempt, line: dict[str, Any], span: Span) -> bool:
        if attempt.is_lost:
            error = WorkerLost(attempts=MAX_ATTEMPTS, stage=attempt.last_stage or "import")
            return await self._finish(attempt, FAILED, line, to_status(error))
        process = BuildProcess(self._command, self._job_line(attempt))
        running = asyncio.create_task(process.run())
        try:
            is_cancelled = await self._accompany(attempt, process, running)
        except asyncio.CancelledError:
            await self._give_back(attempt)
            raise
        if is_cancelled:
            return await self._finish(attempt, CANCELLED, line)
        try:
            status = running.result()
        except Exception:
            self._log.exception("build_failed_unforeseen")
            status = to_status(Internal())
        line["stages"] = dict(process.stage_timings)
        for stage, start_s, end_s in process.stages:
            span.child(stage, start_s, end_s)
        if status is None:
            line["outcome"] = "crashed"
            return False
        state = FAILED if status.code else SUCCEEDED
        return await self._finish(attempt, state, line, status, process.stage_timings)

    async def _accompany(
        self, attempt: Attempt, process: BuildProcess, running: asyncio.Task[Any]
    ) -> bool:
        """Sends heartbeats until the child has ended; True if it was ended because of a cancel.

        However this ends, the child has ended.
        """
        told: BuildProgress | None = None
        try:
            while not running.done():
                progress = process.progress if process.progress != told else None
                try:
                    if await self._queue.beat(self._owner, attempt, progress):
                        return True
                    told = progress or told
                    self._note_redis(None)
                except RedisUnreachable as error:
                    self._note_redis(error)
                await asyncio.wait({running}, timeout=self._beat_s)
            return False
        finally:
            await _end(process, running)

    def _job_line(self, attempt: Attempt) -> str:
        job = attempt.job
        line = {
            "model_uri": job.model_uri,
            "model": job.model,
            "key": job.key.to_dict(),
            "store": self._store.url,
            "local": str(self._store.local),
            "local_bytes": self._store.local_bytes,
            "cache_dir": str(self._cache_dir),
            "calibration_uri": job.calibration_uri,
        }
        return json.dumps(line) + "\n"

    async def _give_back(self, attempt: Attempt) -> None:
        try:
            await self._queue.give_back(self._owner, attempt)
        except (RedisUnreachable, Fenced) as error:  # then it is, or will be, another worker's
            self._log.warning("build_not_given_back", error=type(error).__name__)

    async def _finish(
        self,
        attempt: Attempt,
        state: str,
        line: dict[str, Any],
        status: status_pb2.Status | None = None,
        timings: Sequence[tuple[str, float]] = (),
    ) -> bool:
        line["outcome"] = state
        error = status if status is not None and status.code else None
        if error is not None:
            line["reason"] = reason_of(error)
        while True:
            try:
                if await self._queue.finish(self._owner, attempt, state, error, timings):
                    break
                await self._give_back(attempt)
                raise Fenced  # asked for again while it was being cancelled: anybody's now
            except RedisUnreachable as unreachable:
                self._note_redis(unreachable)
                await asyncio.sleep(_RETRY_S)
        if state == SUCCEEDED:
            self._metrics.seconds.labels(attempt.job.key.arch).observe(
                sum(seconds for _, seconds in timings)
            )
            for stage, seconds in timings:
                self._metrics.stage_seconds.labels(stage).observe(seconds)
        return True


async def _end(process: BuildProcess, running: asyncio.Task[Any]) -> None:
    await process.end()
    running.cancel()  # it may not have started the child yet
    await asyncio.wait({running})
