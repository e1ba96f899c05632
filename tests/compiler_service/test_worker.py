"""Workers with real children and a real Valkey: whatever is killed or stopped, every build ends."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog

from compiler_service.build_queue import MAX_ATTEMPTS, BuildQueue
from compiler_service.build_record import CANCELLED, FAILED, QUEUED, RUNNING, SUCCEEDED, BuildRecord
from shared.errors import reason_of
from shared.redis import EmbeddedRedis, connect_sync
from tests.compiler_service.build_helpers import (
    Folders,
    eventually,
    job,
    open_queue,
    runs,
    working,
)

pytestmark = pytest.mark.redis


@pytest.fixture(autouse=True)
def no_child_is_left_behind() -> Iterator[None]:
    """Every build child of this process has been waited for when a test ends."""
    yield
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    commands = [Path(f"/proc/{pid}/cmdline").read_text() for pid in children]
    assert [command for command in commands if "fake_build_child" in command] == []


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(tmp_path)


@pytest.fixture
async def queue(redis_url: str) -> AsyncIterator[BuildQueue]:
    async with open_queue(redis_url) as opened:
        yield opened


class WorkerProcess:
    """A worker in another process."""

    def __init__(self, url: str, folders: Folders, owner: str) -> None:
        self._process = subprocess.Popen(
            [
                sys.executable, "-m", "tests.compiler_service.worker_process",
                url, str(folders.store.parent), owner,
            ]
        )  # fmt: skip

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture
def other_worker(redis_url: str, folders: Folders) -> Iterator[WorkerProcess]:
    worker = WorkerProcess(redis_url, folders, "other")
    yield worker
    worker.close()


async def end_of(queue: BuildQueue, digest: str) -> BuildRecord:
    async with asyncio.timeout(60):
        return [record async for record in queue.watch(digest)][-1]


async def until(queue: BuildQueue, digest: str, state: str) -> BuildRecord:
    async with asyncio.timeout(60):
        async for record in queue.watch(digest):
            if record.state == state:
                return record
    raise AssertionError(f"the build ended and was never {state}")


@asynccontextmanager
async def waiting_build(queue: BuildQueue, folders: Folders) -> AsyncIterator[str]:
    """A build whose child runs and waits for `folders.release()`."""
    waiting = job("wait")
    await queue.enqueue([waiting])
    await eventually(lambda: len(folders.started()) == 1)
    yield waiting.key.digest


async def test_worker_builds_what_is_asked_for(queue: BuildQueue, folders: Folders) -> None:
    async with working(queue, folders, "a"):
        await queue.enqueue([job("ok")])
        record = await end_of(queue, job("ok").key.digest)
    assert (record.state, record.attempt) == (SUCCEEDED, 1)
    assert [stage for stage, _ in record.stage_timings] == ["import", "publish"]
    assert folders.engines() == [job("ok").key.digest]


async def test_two_workers_and_many_callers_build_once(redis_url: str, folders: Folders) -> None:
    """Leases are long: on a busy machine a short one runs out, and the build begins again as it should."""
    async with (
        open_queue(redis_url, lease_s=30) as queue,
        open_queue(redis_url, lease_s=30) as second,
        working(queue, folders, "a"),
        working(second, folders, "b"),
        waiting_build(queue, folders) as digest,
    ):
        ends = [asyncio.create_task(end_of(q, digest)) for q in (queue, second) * 10]
        await asyncio.gather(*(q.enqueue([job("wait")]) for q in (queue, second) * 10))
        folders.release()
        assert {record.state for record in await asyncio.gather(*ends)} == {SUCCEEDED}
    assert len(folders.started()) == 1


async def test_archs_are_built_one_after_the_other_by_one_worker(
    queue: BuildQueue, redis_url: str, folders: Folders
) -> None:
    jobs = [job("ok", arch) for arch in ("cpu", "sm_80", "sm_90")]
    async with working(queue, folders, "a"):
        await queue.enqueue(jobs)
        for each in jobs:
            assert (await end_of(queue, each.key.digest)).state == SUCCEEDED
    assert [arch for _, arch in folders.started()] == ["cpu", "sm_80", "sm_90"]


async def test_progress_is_told_while_the_child_runs(queue: BuildQueue, folders: Folders) -> None:
    async with working(queue, folders, "a"), waiting_build(queue, folders) as digest:
        async for record in queue.watch(digest):
            if record.progress is not None:
                break
        assert record.progress is not None
        assert (record.progress.stage, record.progress.fraction) == ("import", 0.25)
        assert (record.progress.done_bytes, record.progress.total_bytes) == (1, 4)


async def test_failure_of_the_build_is_told_with_its_reason(
    queue: BuildQueue, folders: Folders
) -> None:
    async with working(queue, folders, "a"):
        await queue.enqueue([job("disk-full")])
        record = await end_of(queue, job("disk-full").key.digest)
    assert record.state == FAILED
    assert record.error is not None
    assert reason_of(record.error) == "DISK_FULL"
    assert folders.engines() == []


async def test_crashed_child_is_started_again(queue: BuildQueue, folders: Folders) -> None:
    async with working(queue, folders, "a"):
        await queue.enqueue([job("crash-once")])
        record = await end_of(queue, job("crash-once").key.digest)
    assert (record.state, record.attempt) == (SUCCEEDED, 2)


async def test_child_that_always_crashes_ends_as_worker_lost(
    queue: BuildQueue, folders: Folders
) -> None:
    async with working(queue, folders, "a"):
        await queue.enqueue([job("crash")])
        record = await end_of(queue, job("crash").key.digest)
        await queue.enqueue([job("ok")])
        assert (await end_of(queue, job("ok").key.digest)).state == SUCCEEDED
    assert record.error is not None
    assert reason_of(record.error) == "WORKER_LOST"
    assert "3 times" in record.error.message
    assert len(folders.started()) == MAX_ATTEMPTS + 1


async def test_cancel_ends_the_child(queue: BuildQueue, folders: Folders) -> None:
    async with working(queue, folders, "a"), waiting_build(queue, folders) as digest:
        await queue.cancel(digest)
        assert (await end_of(queue, digest)).state == CANCELLED
        assert not runs(folders.started()[0][0])
    assert folders.engines() == []


async def test_drained_worker_returns_its_build_uncounted(
    queue: BuildQueue, folders: Folders
) -> None:
    async with working(queue, folders, "a"), waiting_build(queue, folders) as digest:
        pass
    assert not runs(folders.started()[0][0])
    record = await queue.record(digest)
    assert record is not None
    assert (record.state, record.attempt) == (QUEUED, 0)
    folders.release()
    async with working(queue, folders, "b"):
        record = await end_of(queue, digest)
    assert (record.state, record.attempt) == (SUCCEEDED, 1)


async def test_another_worker_finishes_when_one_is_killed(
    queue: BuildQueue, folders: Folders, other_worker: WorkerProcess
) -> None:
    async with waiting_build(queue, folders) as digest:
        await until(queue, digest, RUNNING)
        other_worker.signal(signal.SIGKILL)
        folders.release()
        async with working(queue, folders, "survivor"):
            record = await end_of(queue, digest)
    assert (record.state, record.attempt) == (SUCCEEDED, 2)
    # The killed worker's child died with it.
    await eventually(lambda: not runs(folders.started()[0][0]))


async def test_worker_stopped_past_its_lease_does_no_harm_when_it_goes_on(
    queue: BuildQueue, folders: Folders, other_worker: WorkerProcess
) -> None:
    async with waiting_build(queue, folders) as digest:
        other_worker.signal(signal.SIGSTOP)
        stale_child = folders.started()[0][0]
        async with working(queue, folders, "survivor"):
            await eventually(lambda: len(folders.started()) == 2)
            other_worker.signal(signal.SIGCONT)
            await eventually(lambda: not runs(stale_child))
            record = await queue.record(digest)
            assert record is not None
            assert (record.state, record.attempt) == (RUNNING, 2)
            folders.release()
            record = await end_of(queue, digest)
            assert (record.state, record.attempt) == (SUCCEEDED, 2)
    # The stopped worker lives, and takes the next build.
    await queue.enqueue([job("ok")])
    assert (await end_of(queue, job("ok").key.digest)).state == SUCCEEDED


async def test_build_goes_on_while_redis_is_away(
    queue: BuildQueue, folders: Folders, embedded_redis: EmbeddedRedis
) -> None:
    async with working(queue, folders, "a"), waiting_build(queue, folders) as digest:
        embedded_redis.stop()
        folders.release()
        await eventually(lambda: len(folders.engines()) == 1)
        embedded_redis.start()
        record = await end_of(queue, digest)
        assert (record.state, record.attempt) == (SUCCEEDED, 1)
    assert len(folders.started()) == 1


async def test_build_goes_on_while_redis_takes_no_writes_and_the_log_says_so_once(
    queue: BuildQueue, folders: Folders, redis_url: str
) -> None:
    """A Redis whose memory is full answers every heartbeat with an error of its own."""
    redis = connect_sync(redis_url)
    with structlog.testing.capture_logs() as logs:

        def told() -> list[str]:
            return [log["error"] for log in logs if log["event"] == "redis_unreachable"]

        async with working(queue, folders, "a"), waiting_build(queue, folders) as digest:
            redis.config_set("maxmemory", "1")
            await eventually(lambda: bool(told()))
            folders.release()
            await eventually(lambda: len(folders.engines()) == 1)
            redis.config_set("maxmemory", "0")
            record = await end_of(queue, digest)
            assert (record.state, record.attempt) == (SUCCEEDED, 1)
            await eventually(lambda: "redis_found" in [log["event"] for log in logs])
    assert len(folders.started()) == 1
    (sentence,) = told()
    assert "takes no writes: command not allowed when used memory > 'maxmemory'." in sentence
    assert "worker_failed_unforeseen" not in [log["event"] for log in logs]


async def test_build_goes_on_when_redis_comes_back_empty(
    queue: BuildQueue, folders: Folders, redis_url: str
) -> None:
    async with working(queue, folders, "a"), waiting_build(queue, folders) as digest:
        watch = queue.watch(digest)
        await anext(watch)
        connect_sync(redis_url).flushall()
        folders.release()
        assert [record.state async for record in watch][-1] == SUCCEEDED
        await queue.enqueue([job("ok")])
        assert (await end_of(queue, job("ok").key.digest)).state == SUCCEEDED
    assert len(folders.started()) == 2


async def test_build_whose_end_redis_did_not_hear_is_not_made_again(
    queue: BuildQueue, folders: Folders, embedded_redis: EmbeddedRedis, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """It came back empty, and the client has asked again before the worker could tell."""
    is_unheard, is_asked_again = asyncio.Event(), asyncio.Event()
    tell = queue.finish

    async def finish(*args: Any) -> bool:
        if is_unheard.is_set():
            await is_asked_again.wait()
        try:
            return await tell(*args)
        finally:
            is_unheard.set()

    monkeypatch.setattr(queue, "finish", finish)
    async with working(queue, folders, "a"), waiting_build(queue, folders) as digest:
        embedded_redis.stop()
        folders.release()
        await is_unheard.wait()
        shutil.rmtree(tmp_path / "redis-data" / "appendonlydir")
        embedded_redis.start()
        await queue.enqueue([job("wait")])
        is_asked_again.set()
        record = await end_of(queue, digest)
        assert (record.state, record.attempt) == (SUCCEEDED, 1)
        assert [row.state for row in (await queue.page(10, None))[0]] == [SUCCEEDED]
    assert len(folders.started()) == 1


async def test_idle_worker_outlives_redis(
    queue: BuildQueue, folders: Folders, embedded_redis: EmbeddedRedis
) -> None:
    async with working(queue, folders, "a"):
        embedded_redis.kill()
        embedded_redis.start()
        async with asyncio.timeout(60):
            await queue.enqueue([job("ok")])
            assert (await end_of(queue, job("ok").key.digest)).state == SUCCEEDED
