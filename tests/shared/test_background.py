"""Work that nobody waits for never ends without a word."""

import asyncio
from contextvars import ContextVar, copy_context
from functools import partial

import pytest
import structlog

from shared.background import Background
from shared.server import daemon_registry


class Unforeseen(Exception):
    """What nobody thought of."""


async def test_kept_work_begins_again_when_it_fails_and_the_log_says_why() -> None:
    background, num_begun, is_back = Background(), 0, asyncio.Event()

    async def work() -> None:
        nonlocal num_begun
        num_begun += 1
        if num_begun < 3:
            raise Unforeseen(str(num_begun))
        is_back.set()
        await asyncio.Event().wait()

    with structlog.testing.capture_logs() as logs:
        task = background.keep("watch", work)
        async with asyncio.timeout(60.0):
            await is_back.wait()
    assert [(log["event"], log["task"], log["log_level"]) for log in logs] == [
        ("background_failed", "watch", "error")
    ] * 2
    assert logs[0]["retry_s"] < logs[1]["retry_s"]
    assert not task.done()
    await background.close()
    assert task.cancelled()


async def test_kept_work_that_returns_is_over() -> None:
    background, num_begun = Background(), 0

    async def work() -> None:
        nonlocal num_begun
        num_begun += 1

    await background.keep("once", work)
    await background.close()
    assert num_begun == 1


async def test_work_that_fails_once_is_told_to_the_log_and_to_its_owner() -> None:
    background, is_told = Background(), asyncio.Event()

    async def work() -> None:
        raise Unforeseen

    with structlog.testing.capture_logs() as logs:
        background.run("read", work(), on_failure=is_told.set)
        async with asyncio.timeout(60.0):
            await is_told.wait()
    assert [(log["event"], log["task"]) for log in logs] == [("background_failed", "read")]
    assert isinstance(logs[0]["exc_info"], Unforeseen)


async def test_failures_are_counted_by_task_from_none_on() -> None:
    """What was never there has not grown, for Prometheus: a first failure would go unseen."""
    registry, background, is_told = daemon_registry(), Background(), asyncio.Event()

    def count(task: str) -> float | None:
        return registry.get_sample_value("millrace_background_failures_total", {"task": task})

    begun = 0

    async def fail_twice() -> None:
        nonlocal begun
        begun += 1
        if begun < 3:
            raise Unforeseen

    async def fail() -> None:
        raise Unforeseen

    kept = background.keep("counted_kept", fail_twice)
    background.run("counted_once", fail(), on_failure=is_told.set)
    assert (count("counted_kept"), count("counted_once")) == (0.0, 0.0)
    await asyncio.wait_for(is_told.wait(), 60.0)
    await asyncio.wait_for(kept, 60.0)
    assert (count("counted_kept"), count("counted_once")) == (2.0, 1.0)


async def test_work_for_nobody_has_no_calls_context_and_owned_work_its_starters() -> None:
    """What a call happened to begin outlives it: its lines must not be told as that call's."""
    background, process = Background(), ContextVar("process", default="")
    seen: dict[str, str] = {}

    async def work(name: str) -> None:
        assert process.get() == "what a process has configured stays"
        seen[name] = structlog.contextvars.get_contextvars().get("rpc", "nobody")

    process.set("what a process has configured stays")
    structlog.contextvars.bind_contextvars(rpc="a call")
    tasks = [
        background.keep("kept", partial(work, "kept")),
        background.run("run", work("run")),
        background.run("for a call", work("for a call"), context=copy_context()),
        background.own(work("own")),
    ]
    await asyncio.gather(*tasks)
    structlog.contextvars.clear_contextvars()
    assert seen == {"kept": "nobody", "run": "nobody", "for a call": "a call", "own": "a call"}


async def test_work_that_is_cancelled_or_ends_well_is_no_failure() -> None:
    background, failures = Background(), []

    async def work() -> None:
        await asyncio.sleep(0)

    with structlog.testing.capture_logs() as logs:
        await background.run("short", work(), on_failure=lambda: failures.append("short"))
        background.run("cut", work(), on_failure=lambda: failures.append("cut"))
        await background.close()
        await asyncio.sleep(0)
    assert (logs, failures) == ([], [])


async def test_error_of_owned_work_is_for_whoever_waits() -> None:
    background = Background()

    async def work() -> int:
        raise Unforeseen

    with structlog.testing.capture_logs() as logs, pytest.raises(Unforeseen):
        await background.own(work())
    assert logs == []


async def test_what_is_closed_has_ended_when_close_returns() -> None:
    background, has_left = Background(), False

    async def work() -> None:
        nonlocal has_left
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            has_left = True

    background.own(work())
    await asyncio.sleep(0)
    await background.close()
    assert has_left
