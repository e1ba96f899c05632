"""A runtime that has too much to do refuses cheaply, fairly, and says when to come back."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog
from millrace.runtime.v1 import runtime_pb2 as pb

from runtime_service.generation import Generation
from runtime_service.generation_call import GenerationCall
from runtime_service.served_engine import EngineText
from shared.auth import ALL_SCOPES, Principal
from shared.errors import QueueFull, from_status, to_status
from shared.quotas import Limits, TenantQuota
from tests.runtime_service.daemon import (
    ENDLESS,
    ENDLESS_TOKENS,
    Call,
    Daemon,
    running_daemon,
    start_of,
    until,
)

FULL = {"max_waiting_tokens": 8, "max_sequences": 1, "step_s": 0.002, **ENDLESS}


async def fill(daemon: Daemon) -> Call:
    """A call on which one generation runs for ever, and others wait until the queue is full."""
    call = daemon.call()
    await call.start("running", [40], max_new_tokens=ENDLESS_TOKENS)
    await call.read_until(lambda: call.num_tokens("running") > 0)
    for name in ("waiting", "next"):
        await call.start(name, [40, 41, 42, 43], max_new_tokens=8)
    return call


async def test_short_prompts_have_no_easier_way_into_a_full_queue(tmp_path: Path) -> None:
    """Else long ones would never come in as long as there are enough short ones."""
    async with running_daemon(tmp_path, **FULL) as daemon:  # type: ignore[arg-type]
        call = daemon.call()
        await call.start("running", [40], max_new_tokens=ENDLESS_TOKENS)
        await call.read_until(lambda: call.num_tokens("running") > 0)
        await call.start("first", [40] * 7, max_new_tokens=1)
        await call.start(
            "long", [40] * 100, max_new_tokens=1
        )  # one token is free, and it comes next
        await call.start("short", [40], max_new_tokens=1)
        error = from_status((await call.read_to_end("short")).error)
        assert error.fields == {"waiting_tokens": "107", "max_waiting_tokens": "8"}
        await call.send(cancel=pb.CancelGeneration(request_id="running"))
        seen = await call.finish()
        assert (seen["first"].reason, seen["long"].reason) == ("LENGTH", "LENGTH")


class _NoTokenizer:
    """A model's text side that fails whoever asks it for tokens."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def encode(self, text: str) -> list[int]:
        raise AssertionError(f"{text!r} was tokenized")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


async def test_text_is_not_tokenized_to_be_refused(tmp_path: Path) -> None:
    async with running_daemon(tmp_path, **FULL) as daemon:  # type: ignore[arg-type]
        call = await fill(daemon)
        served = daemon.runtime.served
        assert served is not None
        text = EngineText(_NoTokenizer(served.text.model), served.text.vocab_size)  # type: ignore[arg-type]
        daemon.runtime.keeper.served = replace(served, text=text)
        await call.start("text", "to be refused")
        assert from_status((await call.read_to_end("text")).error).reason == "QUEUE_FULL"
        assert not daemon.runtime._line._prepared.num_tokens
        assert daemon.runtime.metrics.num_ended("QUEUE_FULL") == 1
        await call.start("other", [40], model="nobody's")
        assert from_status((await call.read_to_end("other")).error).reason == "MODEL_NOT_SERVED"


async def test_prompt_that_never_runs_is_refused_as_such_and_sends_nobody_away(
    tmp_path: Path,
) -> None:
    too_long = int(ENDLESS["max_sequence_tokens"]) + 1
    async with running_daemon(tmp_path, **FULL) as daemon:  # type: ignore[arg-type]
        call = await fill(daemon)
        await call.start("long", [40] * too_long)
        error = from_status((await call.read_to_end("long")).error)
        assert error.reason == "PROMPT_TOO_LONG"
        await call.start("refused", [40])
        assert from_status((await call.read_to_end("refused")).error).retry_after_s == 0.2


async def test_more_that_are_refused_are_told_to_come_back_later(tmp_path: Path) -> None:
    async with running_daemon(tmp_path, **FULL) as daemon:  # type: ignore[arg-type]
        call = await fill(daemon)
        names = [f"refused{number}" for number in range(100)]
        for name in names:
            await call.start(name, [40, 41, 42, 43])
        delays = [
            from_status((await call.read_to_end(name)).error).retry_after_s or 0.0 for name in names
        ]
        assert min(delays) >= 0.1
        # Nothing leaves the queue: half of it takes half a second, as long as nothing else is known.
        assert delays[-1] > delays[0] + 10


class _Full:
    """Starts nothing."""

    def check_room(self, start: pb.StartGeneration, cache_salt: str) -> None:
        raise QueueFull(waiting_tokens=9, max_waiting_tokens=8)

    def new_generation(self, *_: object) -> Generation:
        raise AssertionError("a refused start became a generation")

    def share_of_resumed(self, *_: object) -> None:
        raise AssertionError("nothing is resumed")

    def resume(self, *_: object) -> None:
        raise AssertionError("nothing is resumed")

    def start(self, *_: object) -> None:
        raise AssertionError("a refused start was started")


async def test_whom_the_own_limit_keeps_out_is_told_so_and_stands_in_no_line() -> None:
    """The line is everybody's: who may not run makes others wait for nothing."""
    quota = TenantQuota(Limits(concurrent=1))
    running = quota.open_generation()
    call: GenerationCall[Generation] = GenerationCall(_Full(), Principal("acme", ALL_SCOPES, quota))
    messages = call.messages()
    call.follow(pb.GenerateRequest(start=start_of([40], request_id="over")))
    running.close(0)
    call.follow(pb.GenerateRequest(start=start_of([40], request_id="within")))
    call.half_close()
    errors = [from_status(event.error).reason for event in await anext(messages)]
    assert errors == ["QUOTA_EXCEEDED", "QUEUE_FULL"]
    call.close()


async def test_refusals_that_come_together_are_told_in_one_message() -> None:
    """However few of them come in one turn of the loop: a message for each is most of their cost."""
    call: GenerationCall[Generation] = GenerationCall(_Full())
    messages = call.messages()
    for number in range(100):
        call.follow(pb.GenerateRequest(start=start_of([40], request_id=str(number))))
    assert not call._news.is_set(), "the first one would go alone"
    events = await anext(messages)
    assert [event.request_id for event in events] == [str(number) for number in range(100)]
    call.follow(pb.GenerateRequest(start=start_of([40], request_id="last")))
    call.half_close()
    assert call._news.is_set(), "nothing comes any more for which to wait"
    assert [event.request_id for event in await anext(messages)] == ["last"]
    call.close()


async def test_refused_starts_leave_a_line_a_second_together(tmp_path: Path) -> None:
    async with running_daemon(tmp_path, **FULL) as daemon:  # type: ignore[arg-type]
        call = await fill(daemon)
        with structlog.testing.capture_logs() as lines:

            def told() -> list[int]:
                return [line["count"] for line in lines if line["event"] == "starts_refused"]

            for number in range(50):
                await call.start(str(number), [40])
            for number in range(50):
                await call.read_to_end(str(number))
            await until(lambda: sum(told()) >= 50)
        assert sum(told()) == 50
        assert len(told()) < 10
        assert not [line for line in lines if line["event"] == "generation_finished"]


def test_status_of_an_error_is_made_once() -> None:
    error = QueueFull(waiting_tokens=9, max_waiting_tokens=8)
    assert to_status(error) is to_status(error)
    assert to_status(error) == to_status(QueueFull(waiting_tokens=9, max_waiting_tokens=8))
