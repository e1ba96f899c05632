"""The queue in a real Valkey: one key is one build, leases are fenced, nothing is lost."""

import asyncio

import pytest
from prometheus_client import CollectorRegistry

from compiler_service.build_queue import BUILDS, GROUP, KEPT_S, MAX_ATTEMPTS, Fenced, Lease
from compiler_service.build_record import CANCELLED, FAILED, QUEUED, RUNNING, SUCCEEDED
from compiler_service.daemon import _sample_queue
from compiler_service.metrics import CompilerMetrics
from compiler_service.progress import BuildProgress
from shared.errors import BuildNotFound, BuildQueueFull, DiskFull, reason_of, to_status
from shared.redis import MAX_BLOCK_S, connect_sync
from tests.compiler_service.build_helpers import DIGEST, JOB, job, open_queue, state_of, take
from tests.runtime_service.daemon import until

pytestmark = pytest.mark.redis


async def test_asking_twice_is_asking_once(redis_url: str) -> None:
    async with open_queue(redis_url) as queue:
        await asyncio.gather(*(queue.enqueue([JOB]) for _ in range(50)))
        assert await queue.num_waiting() == 1
        _, attempt = await take(queue, "a")
        await queue.enqueue([JOB])
        assert await queue.num_waiting() == 0
        assert await queue.finish("a", attempt, SUCCEEDED)
        assert await state_of(queue) == SUCCEEDED


async def test_requests_that_wait_are_told_as_a_metric(redis_url: str) -> None:
    metrics = CompilerMetrics(CollectorRegistry())
    async with open_queue(redis_url) as queue:
        await queue.enqueue([JOB])
        await queue.enqueue([job(arch="sm_90")])
        sampling = asyncio.create_task(_sample_queue(queue, metrics))
        await until(lambda: metrics.waiting._value.get() == 2)
        sampling.cancel()


async def test_archs_of_one_request_go_to_one_worker(redis_url: str) -> None:
    archs = ["cpu", "sm_80", "sm_90"]
    jobs = [job(arch=arch) for arch in archs]
    async with open_queue(redis_url, lease_s=60) as queue:
        await queue.enqueue(jobs[:1])
        await queue.enqueue(jobs)
        assert (await queue.lease("a")) == Lease(_first(redis_url), (jobs[0].key.digest,))
        lease = await queue.lease("b")
        assert lease is not None
        assert lease.digests == (jobs[1].key.digest, jobs[2].key.digest)


async def test_progress_and_end_are_in_the_record(redis_url: str) -> None:
    async with open_queue(redis_url) as queue:
        await queue.enqueue([JOB])
        _, attempt = await take(queue, "a")
        progress = BuildProgress("quantize", 0.5, 10, 20, 7.5)
        assert not await queue.beat("a", attempt, progress)
        record = await queue.record(DIGEST)
        assert record is not None
        assert (record.state, record.progress, record.attempt) == (RUNNING, progress, 1)
        await queue.finish("a", attempt, FAILED, to_status(DiskFull(path="/s")), [("import", 1.5)])
        record = await queue.record(DIGEST)
        assert record is not None
        assert record.error is not None
        assert reason_of(record.error) == "DISK_FULL"
        assert record.stage_timings == (("import", 1.5),)
        assert record.progress is None
        assert record.end_s is not None
        assert record.start_s is not None
        assert record.create_s <= record.start_s <= record.end_s


@pytest.mark.parametrize("state", [FAILED, CANCELLED, SUCCEEDED])
async def test_ended_build_is_started_anew_when_it_is_asked_for(redis_url: str, state: str) -> None:
    async with open_queue(redis_url, lease_s=60) as queue:
        await queue.enqueue([JOB])
        _, attempt = await take(queue, "a")
        if state == CANCELLED:
            await queue.cancel(DIGEST)
        await queue.finish("a", attempt, state)
        await queue.enqueue([JOB])
        assert await state_of(queue) == QUEUED
        _, second = await take(queue, "b")
        assert (second.number, second.fence) == (1, attempt.fence + 1)


async def test_silent_worker_is_fenced_off(redis_url: str) -> None:
    async with open_queue(redis_url, lease_s=0.15) as queue:
        await queue.enqueue([JOB])
        lease, stale = await take(queue, "a")
        _, fresh = await take(queue, "b")
        assert fresh.number == 2
        with pytest.raises(Fenced):
            await queue.beat("a", stale, BuildProgress("publish", 0.9))
        with pytest.raises(Fenced):
            await queue.finish("a", stale, SUCCEEDED)
        with pytest.raises(Fenced):
            await queue.give_back("a", stale)
        with pytest.raises(Fenced):
            await queue.start("a", lease, DIGEST)
        await queue.close("a", lease)
        assert await state_of(queue) == RUNNING
        assert not await queue.beat("b", fresh)
        assert await queue.finish("b", fresh, SUCCEEDED)


async def test_idle_worker_of_a_long_lease_waits_no_longer_than_redis_is_given(
    redis_url: str,
) -> None:
    with connect_sync(redis_url) as client, client.monitor() as monitor:

        def block_s() -> float:
            for command in monitor.listen():
                words = command["command"].split()
                if words[0] == "XREADGROUP":
                    return int(words[words.index("BLOCK") + 1]) / 1000
            raise AssertionError("it reads")

        async with open_queue(redis_url, lease_s=3600) as queue:
            leasing = asyncio.create_task(queue.lease("a"))
            assert await asyncio.to_thread(block_s) <= MAX_BLOCK_S
            leasing.cancel()
            await asyncio.wait({leasing})


async def test_lost_build_is_found_behind_many_live_ones(redis_url: str) -> None:
    jobs = [job(f"ok-{number}") for number in range(13)]
    async with open_queue(redis_url, lease_s=60) as queue:
        for each in jobs:
            await queue.enqueue([each])
        leases = [await queue.lease(f"worker-{number}") for number in range(len(jobs))]
        lost = leases[-1]
        assert lost is not None
        with connect_sync(redis_url) as client:
            client.xclaim(BUILDS, GROUP, "worker-12", 0, [lost.entry], idle=60_001, justid=True)
        assert await queue.lease("next") == lost


async def test_heartbeats_keep_the_lease(redis_url: str) -> None:
    other = job(arch="sm_90")
    async with open_queue(redis_url, lease_s=60) as queue:
        await queue.enqueue([JOB])
        lease, attempt = await take(queue, "a")
        await queue.enqueue([other])
        with connect_sync(redis_url) as client:  # time passes
            client.xclaim(BUILDS, GROUP, "a", 0, [lease.entry], idle=60_001, justid=True)
        await queue.beat("a", attempt)
        # What is lost would come first.
        found = await queue.lease("b")
        assert found is not None
        assert found.digests == (other.key.digest,)


async def test_build_fails_with_worker_lost_after_too_many_attempts(redis_url: str) -> None:
    async with open_queue(redis_url, lease_s=0.1) as queue:
        await queue.enqueue([JOB])
        for number in range(1, MAX_ATTEMPTS + 1):
            _, attempt = await take(queue, f"worker-{number}")
            assert (attempt.number, attempt.is_lost) == (number, False)
            await queue.beat(f"worker-{number}", attempt, BuildProgress("kernels", 0.9))
        _, last = await take(queue, "last")
        assert last.is_lost
        assert last.last_stage == "kernels"


async def test_returned_build_is_taken_at_once_and_uncounted(redis_url: str) -> None:
    async with open_queue(redis_url, lease_s=30) as queue:
        await queue.enqueue([JOB])
        _, attempt = await take(queue, "a")
        await queue.give_back("a", attempt)
        await queue.leave("a")
        assert await state_of(queue) == QUEUED
        _, again = await take(queue, "b")
        assert again.number == 1
        assert again.fence > attempt.fence


async def test_leaving_worker_frees_a_lease_that_it_did_not_start(redis_url: str) -> None:
    async with open_queue(redis_url, lease_s=30) as queue:
        await queue.enqueue([JOB])
        assert await queue.lease("a") is not None
        await queue.leave("a")
        _, attempt = await take(queue, "b")
        assert attempt.number == 1


async def test_waiting_build_is_cancelled_at_once(redis_url: str) -> None:
    async with open_queue(redis_url) as queue:
        await queue.enqueue([JOB])
        await queue.cancel(DIGEST)
        assert await state_of(queue) == CANCELLED
        assert await queue.num_waiting() == 0
        await queue.cancel(DIGEST)
        assert await state_of(queue) == CANCELLED


async def test_running_build_is_cancelled_at_its_heartbeat(redis_url: str) -> None:
    async with open_queue(redis_url) as queue:
        await queue.enqueue([JOB])
        _, attempt = await take(queue, "a")
        await queue.cancel(DIGEST)
        assert await queue.beat("a", attempt)
        assert await queue.finish("a", attempt, CANCELLED)
        assert await state_of(queue) == CANCELLED


async def test_build_asked_for_again_while_it_is_cancelled_is_not_cancelled(redis_url: str) -> None:
    async with open_queue(redis_url) as queue:
        await queue.enqueue([JOB])
        _, attempt = await take(queue, "a")
        await queue.cancel(DIGEST)
        assert await queue.beat("a", attempt)
        await queue.enqueue([JOB])
        assert not await queue.finish("a", attempt, CANCELLED)
        assert not await queue.beat("a", attempt)


async def test_cancelled_arch_of_a_waiting_request_is_skipped(redis_url: str) -> None:
    jobs = [job(arch="cpu"), job(arch="sm_90")]
    async with open_queue(redis_url) as queue:
        await queue.enqueue(jobs)
        await queue.cancel(jobs[0].key.digest)
        lease = await queue.lease("a")
        assert lease is not None
        assert await queue.start("a", lease, jobs[0].key.digest) is None
        assert await queue.start("a", lease, jobs[1].key.digest) is not None


async def test_full_queue_refuses_new_builds_and_joins_old_ones(redis_url: str) -> None:
    async with open_queue(redis_url, max_queued=2) as queue:
        await queue.enqueue([job(arch="cpu")])
        await queue.enqueue([job(arch="sm_80")])
        with pytest.raises(BuildQueueFull, match="2 builds are waiting and at most 2 may"):
            await queue.enqueue([job(arch="sm_90")])
        await queue.enqueue([job(arch="cpu")])
        await take(queue, "a")
        await queue.enqueue([job(arch="sm_90")])


async def test_watch_begins_with_the_state_and_ends_with_the_end(redis_url: str) -> None:
    async with open_queue(redis_url) as queue:
        await queue.enqueue([JOB])
        watch = queue.watch(DIGEST)
        assert (await anext(watch)).state == QUEUED
        _, attempt = await take(queue, "a")
        assert (await anext(watch)).state == RUNNING
        await queue.finish("a", attempt, SUCCEEDED)
        assert [record.state async for record in watch] == [SUCCEEDED]
        assert [record.state async for record in queue.watch(DIGEST)] == [SUCCEEDED]


async def test_watch_of_an_unknown_build_says_so(redis_url: str) -> None:
    async with open_queue(redis_url) as queue:
        with pytest.raises(BuildNotFound):
            await anext(queue.watch("f" * 64))
        with pytest.raises(BuildNotFound):
            await queue.cancel("f" * 64)


async def test_pages_list_builds_newest_first(redis_url: str) -> None:
    jobs = [job(f"b{i}") for i in range(7)]
    async with open_queue(redis_url) as queue:
        for each in jobs:
            await queue.enqueue([each])
        seen, before, sizes = [], None, []
        while True:
            records, before = await queue.page(3, before)
            sizes.append(len(records))
            seen += [record.job.model_uri for record in records]
            if before is None:
                break
        assert seen == [f"fake:b{i}" for i in reversed(range(7))]
        assert sizes == [3, 3, 1]


async def test_every_key_expires_or_empties(redis_url: str) -> None:
    client = connect_sync(redis_url)
    async with open_queue(redis_url) as queue:
        await queue.enqueue([JOB])
        lease, attempt = await take(queue, "a")
        await queue.beat("a", attempt, BuildProgress("import", 0.1))
        await queue.finish("a", attempt, SUCCEEDED)
        await queue.close("a", lease)
    assert client.xlen(BUILDS) == 0
    for key in client.keys("*"):
        if key != BUILDS:
            assert 0 < client.ttl(key) <= KEPT_S, key


def _first(url: str) -> str:
    entries = connect_sync(url).xrange(BUILDS)
    assert entries
    return str(entries[0][0])
