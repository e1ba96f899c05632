"""Jobs, queues and workers for the tests of queue and worker."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from prometheus_client import CollectorRegistry

from compiler_service.build_queue import Attempt, BuildQueue, Fenced, Lease
from compiler_service.build_record import BuildJob
from compiler_service.metrics import CompilerMetrics
from compiler_service.worker import BuildStore, Worker
from shared.engine import EngineKey, QuantConfig
from shared.redis import connect

FAKE_CHILD = (sys.executable, "-m", "tests.compiler_service.fake_build_child")
LEASE_S = 0.6


def job(behaviour: str = "ok", arch: str = "cpu") -> BuildJob:
    """A job whose fake child does what `behaviour` says."""
    key = EngineKey("a" * 64, arch, QuantConfig("int8"), f"builder-{behaviour}")
    return BuildJob(f"fake:{behaviour}", "tiny", key)


JOB = job()
DIGEST = JOB.key.digest


@asynccontextmanager
async def open_queue(
    url: str, lease_s: float = LEASE_S, max_queued: int = 100
) -> AsyncIterator[BuildQueue]:
    """A queue on a connection of its own."""
    client = connect(url)
    yield BuildQueue(client, url, lease_s, max_queued)
    await client.aclose()


async def take(queue: BuildQueue, owner: str) -> tuple[Lease, Attempt]:
    """Leases and starts the next build, waiting for leases to run out where it must."""
    async with asyncio.timeout(60):
        while True:
            lease = await queue.lease(owner)
            if lease is None:
                continue
            try:
                attempt = await queue.start(owner, lease, lease.digests[0])
            except Fenced:  # its worker started late: the lease goes back to it, and runs out again
                continue
            assert attempt is not None
            return lease, attempt


async def state_of(queue: BuildQueue, digest: str = DIGEST) -> str:
    """What the record of a build says."""
    record = await queue.record(digest)
    assert record is not None
    return record.state


class Folders:
    """Where fake children leave their traces."""

    def __init__(self, root: Path) -> None:
        self.store, self.cache = root / "store", root / "cache"
        self.store.mkdir(exist_ok=True)
        self.cache.mkdir(exist_ok=True)

    def started(self) -> list[tuple[int, str]]:
        """Process id and arch of every child so far."""
        file = self.cache / "started"
        lines = file.read_text().splitlines() if file.exists() else []
        return [(int(pid), arch) for pid, arch in (line.split() for line in lines)]

    def release(self) -> None:
        """Lets waiting children go on."""
        (self.cache / "release").touch()

    def engines(self) -> list[str]:
        """Digests of what was published."""
        return sorted(path.name for path in self.store.iterdir())


@asynccontextmanager
async def working(
    queue: BuildQueue, folders: Folders, owner: str
) -> AsyncIterator[asyncio.Task[None]]:
    """A worker that is drained at the end of the block."""
    metrics = CompilerMetrics(CollectorRegistry())
    store = BuildStore(str(folders.store), folders.cache)
    worker = Worker(queue, owner, FAKE_CHILD, store, folders.cache, metrics)
    task = asyncio.create_task(worker.run())
    try:
        yield task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def eventually(claim: Callable[[], bool], limit_s: float = 60.0) -> None:
    """Waits until what another process does has made `claim` true."""
    deadline = time.monotonic() + limit_s
    while not claim():
        assert time.monotonic() < deadline, "it did not come true"
        await asyncio.sleep(0.01)


def runs(pid: int) -> bool:
    """Claims that a process of this id runs."""
    status = Path(f"/proc/{pid}/status")
    try:
        return "Z (zombie)" not in status.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
