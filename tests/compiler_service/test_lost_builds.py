"""The queue in a real Valkey that lost its data, or holds what is not ours: every build ends, once for everybody."""

import pytest

from compiler_service.build_queue import BUILDS, Attempt, BuildQueue, Fenced
from compiler_service.build_record import CANCELLED, FAILED, QUEUED, RUNNING, SUCCEEDED
from compiler_service.progress import BuildProgress
from shared.errors import RedisUnreachable
from shared.redis import EmbeddedRedis, connect_sync
from tests.compiler_service.build_helpers import DIGEST, JOB, open_queue, state_of, take


async def test_running_build_is_registered_anew_when_redis_lost_its_data(
    embedded_redis: EmbeddedRedis,
) -> None:
    url = embedded_redis.url
    async with open_queue(url, lease_s=60) as queue:
        await queue.enqueue([JOB])
        _, attempt = await take(queue, "a")
        connect_sync(url).flushall()
        assert not await queue.beat("a", attempt, BuildProgress("quantize", 0.5))
        record = await queue.record(DIGEST)
        assert record is not None
        assert (record.state, record.job) == (RUNNING, JOB)
        # Another worker that reads the new entry leaves the build to its owner ...
        lease = await queue.lease("b")
        assert lease is not None
        with pytest.raises(Fenced):
            await queue.start("b", lease, DIGEST)
        assert not await queue.beat("a", attempt)
        assert await queue.finish("a", attempt, SUCCEEDED)


async def test_build_registered_anew_is_recovered_when_its_worker_dies(redis_url: str) -> None:
    """As long as it may live, the build is its own; who believes in it for less takes the build over."""
    async with (
        open_queue(redis_url, lease_s=60) as queue,
        open_queue(redis_url, lease_s=0.15) as impatient,
    ):
        await queue.enqueue([JOB])
        _, attempt = await take(queue, "a")
        connect_sync(redis_url).flushall()
        await queue.beat("a", attempt)
        lease = await queue.lease("b")
        assert lease is not None
        with pytest.raises(Fenced):
            await queue.start("b", lease, DIGEST)
        _, recovered = await take(impatient, "c")
        assert recovered.number == 2


async def running_and_asked_for_again(queue: BuildQueue, redis_url: str) -> Attempt:
    """JOB runs; Redis has lost that, and has been asked for it anew."""
    await queue.enqueue([JOB])
    _, attempt = await take(queue, "a")
    connect_sync(redis_url).flushall()
    await queue.enqueue([JOB])
    return attempt


async def test_running_build_is_adopted_when_it_was_asked_for_again_after_a_loss(
    redis_url: str,
) -> None:
    async with open_queue(redis_url) as queue:
        attempt = await running_and_asked_for_again(queue, redis_url)
        assert not await queue.beat("a", attempt)
        assert await state_of(queue) == RUNNING
        assert await queue.finish("a", attempt, SUCCEEDED)


@pytest.mark.parametrize("state", [SUCCEEDED, FAILED, CANCELLED])
async def test_build_that_ends_after_redis_lost_its_data_ends_once_for_everybody(
    redis_url: str, state: str
) -> None:
    """Between its last heartbeat and its end there is no other sign of it."""
    async with open_queue(redis_url, lease_s=60) as queue:
        await queue.enqueue([JOB])
        lease, attempt = await take(queue, "a")
        watch = queue.watch(DIGEST)
        assert (await anext(watch)).state == RUNNING
        connect_sync(redis_url).flushall()
        assert await queue.finish("a", attempt, state)
        assert [record.state async for record in watch] == [state]
        listed, _ = await queue.page(10, None)
        assert [(record.job, record.state, record.attempt) for record in listed] == [
            (JOB, state, attempt.number)
        ]
        await queue.close("a", lease)
        assert await queue.num_waiting() == 0


async def test_build_that_ends_after_a_loss_is_not_made_again_for_who_asked_meanwhile(
    redis_url: str,
) -> None:
    async with open_queue(redis_url) as queue:
        attempt = await running_and_asked_for_again(queue, redis_url)
        assert await queue.finish("a", attempt, SUCCEEDED)
        assert await state_of(queue) == SUCCEEDED
        lease = await queue.lease("b")
        assert lease is not None
        assert await queue.start("b", lease, DIGEST) is None, "nothing of it is left to do"
        await queue.close("b", lease)
        assert await queue.num_waiting() == 0


async def test_cancelled_build_that_is_asked_for_after_a_loss_is_made(redis_url: str) -> None:
    async with open_queue(redis_url) as queue:
        await queue.enqueue([JOB])
        _, attempt = await take(queue, "a")
        await queue.cancel(DIGEST)
        connect_sync(redis_url).flushall()
        await queue.enqueue([JOB])
        assert not await queue.finish("a", attempt, CANCELLED)
        await queue.give_back("a", attempt)
        assert await state_of(queue) == QUEUED
        _, again = await take(queue, "b")
        assert await queue.finish("b", again, SUCCEEDED)


@pytest.mark.parametrize("is_asked_again", [False, True])
async def test_build_that_is_given_back_after_a_loss_waits_for_another_worker(
    redis_url: str, is_asked_again: bool
) -> None:
    async with open_queue(redis_url) as queue:
        await queue.enqueue([JOB])
        _, attempt = await take(queue, "a")
        connect_sync(redis_url).flushall()
        if is_asked_again:
            await queue.enqueue([JOB])
        await queue.give_back("a", attempt)
        await queue.leave("a")
        assert await queue.num_waiting() == 1
        assert await state_of(queue) == QUEUED
        _, again = await take(queue, "b")
        assert (again.number, again.job) == (1, JOB)
        with pytest.raises(Fenced):
            await queue.finish("a", attempt, SUCCEEDED)
        assert await queue.finish("b", again, SUCCEEDED)


async def test_absent_redis_is_a_clear_error(embedded_redis: EmbeddedRedis) -> None:
    async with open_queue(embedded_redis.url) as queue:
        await queue.enqueue([JOB])
        embedded_redis.stop()
        with pytest.raises(RedisUnreachable):
            await queue.enqueue([JOB])
        with pytest.raises(RedisUnreachable):
            await anext(queue.watch(DIGEST))
        embedded_redis.start()
        assert await state_of(queue) == QUEUED


async def test_keys_of_others_hide_no_build(redis_url: str) -> None:
    redis = connect_sync(redis_url)
    async with open_queue(redis_url) as queue:
        for name, text in (("list", None), ("half", "1")):
            redis.zadd("builds:index", {name: 1})
            if text is None:
                redis.rpush(f"build:{name}", "1")
            else:
                redis.hset(f"build:{name}", "state", text)
        await queue.enqueue([JOB])
        found, _ = await queue.page(10, None)
        assert [record.job for record in found] == [JOB]
        assert await queue.record("list") is None


async def test_entry_that_names_no_build_is_passed_over(redis_url: str) -> None:
    redis = connect_sync(redis_url)
    async with open_queue(redis_url) as queue:
        await queue.lease("a")  # makes the group
        redis.xadd(BUILDS, {"other": "1"})
        await queue.enqueue([JOB])
        _, attempt = await take(queue, "a")
        assert attempt.digest == DIGEST
        assert redis.xlen(BUILDS) == 1
