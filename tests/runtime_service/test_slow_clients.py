"""What is owed to clients that read slowly or not at all is bounded, and what waits for the engine, too."""

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from millrace.runtime.v1 import runtime_pb2 as pb

from runtime_service.engine_messages import AddCredit, Command, UpdateRequest
from runtime_service.generation import Generation
from runtime_service.generation_call import END_TOKENS, MAX_UNREAD_TOKENS, GenerationCall
from runtime_service.metrics import RuntimeMetrics
from runtime_service.scheduling.request import Request, SamplingParams, StopParams
from runtime_service.served_engine import EngineText
from runtime_service.start_line import LARGE_START_BYTES, MAX_PREPARED_TOKENS, MIN_PREPARED_TOKENS
from shared.errors import QueueFull, from_status, reason_of
from tests.runtime_service.daemon import (
    ENDLESS,
    ENDLESS_TOKENS,
    HANG_S,
    Daemon,
    running_daemon,
    start_of,
    still_works,
    until,
)


async def test_starts_that_wait_for_their_tokens_are_bounded(tmp_path: Path) -> None:
    """What no engine has queued yet counts too: more is refused, and told when to come back."""
    async with running_daemon(tmp_path, step_s=0.01) as daemon:
        call = daemon.runtime.open_call()
        most = MAX_PREPARED_TOKENS // MIN_PREPARED_TOKENS
        generations = [
            call.start(start_of("hello", request_id=str(number), max_new_tokens=1))
            for number in range(most + 1)
        ]
        assert not any(generation.is_ended for generation in generations[:-1])
        error = generations[-1].error
        assert isinstance(error, QueueFull)
        assert error.retry_after_s
        daemon.runtime.close_call(call)
        await until(lambda: not daemon.runtime._line._prepared.num_tokens)
        await still_works(daemon)


async def test_full_queue_refuses_with_a_hint_when_to_come_back(tmp_path: Path) -> None:
    async with running_daemon(
        tmp_path, step_s=0.02, max_waiting_tokens=200, max_sequences=1, **ENDLESS
    ) as daemon:
        call = daemon.call()
        await call.start("runs", [40], max_new_tokens=ENDLESS_TOKENS)
        await call.read_until(lambda: call.num_tokens("runs") > 0)
        await call.start("waits", [41] * 200, max_new_tokens=1)
        await call.start("refused", [42] * 150, max_new_tokens=1)
        await call.read_to_end("refused")
        await call.send(cancel=pb.CancelGeneration(request_id="runs"))
        seen = await call.finish()
    error = from_status(seen["refused"].error)
    assert error.reason == "QUEUE_FULL"
    assert error.retry_after_s
    assert 0.1 <= error.retry_after_s <= 30
    assert (seen["waits"].reason, seen["runs"].reason) == ("LENGTH", "CANCELLED")


async def test_starts_without_credit_keep_nobody_out_and_are_bounded_themselves(
    tmp_path: Path,
) -> None:
    """They wait for their client and not for the engine; once they have credit they count like all others."""
    async with running_daemon(
        tmp_path, step_s=0.02, max_waiting_tokens=200, max_sequences=1, **ENDLESS
    ) as daemon:
        call = daemon.call()
        await call.start("held", [41] * 200, max_new_tokens=1, credit_tokens=0)
        await call.start("refused", [41] * 150, max_new_tokens=1, credit_tokens=0)
        await call.read_to_end("refused")
        assert daemon.client.waiting_tokens == 0
        await call.start("runs", [40], max_new_tokens=ENDLESS_TOKENS)
        await call.read_until(lambda: call.num_tokens("runs") > 0)
        await call.start("waits", [42] * 40, max_new_tokens=1)
        await until(lambda: daemon.client.waiting_tokens == 40)
        await call.let_go_on("held")
        await until(lambda: daemon.client.waiting_tokens == 240)
        await call.start("late", [42] * 40, max_new_tokens=1)
        await call.read_to_end("late")
        await call.send(cancel=pb.CancelGeneration(request_id="runs"))
        seen = await call.finish()
        assert daemon.client.waiting_tokens == 0
    assert (seen["held"].reason, seen["waits"].reason) == ("LENGTH", "LENGTH")
    for name in ("refused", "late"):
        assert from_status(seen[name].error).reason == "QUEUE_FULL"


async def test_prompt_larger_than_the_queue_may_wait_alone(tmp_path: Path) -> None:
    async with running_daemon(tmp_path, max_waiting_tokens=10) as daemon:
        call = daemon.call()
        await call.start("large", [41] * 300, max_new_tokens=1)
        assert (await call.finish())["large"].reason == "LENGTH"


async def test_client_that_never_reads_costs_a_bounded_buffer(tmp_path: Path) -> None:
    """It is read from no more once it leaves too much unread; others do not notice."""
    async with running_daemon(
        tmp_path, max_sequences=128, num_blocks=8192, max_waiting_tokens=2000
    ) as daemon:
        raw = daemon.stub.Generate()

        async def flood() -> None:
            for number in range(50_000):
                start = start_of([40] * 11, request_id=f"{number:0256}", max_new_tokens=500)
                await raw.write(pb.GenerateRequest(start=start))

        flooding = asyncio.create_task(flood())
        (deaf,) = await _calls(daemon)
        await until(lambda: not deaf._room.is_set())
        # One more is taken while fewer than 2000 tokens wait.
        most_running = 128 + 2000 // 11 + 1
        assert len(deaf._running) <= most_running
        # Until its own have ended the queue may be full for anybody.
        await daemon.freed()
        await still_works(daemon)
        most_tokens = MAX_UNREAD_TOKENS + (most_running + 1) * (500 + 2 * END_TOKENS)
        assert deaf._num_owed_tokens < most_tokens
        assert not flooding.done()
        flooding.cancel()
        raw.cancel()
        await until(lambda: not daemon.runtime._calls)


class _NoStarter:
    def new_generation(self, *_: object) -> Generation:
        raise AssertionError("a refused start was started")

    def resume(self, *_: object) -> None:
        raise AssertionError("nothing is resumed")

    def start(self, generation: Generation, start: pb.StartGeneration, cache_salt: str) -> None:
        raise AssertionError("a refused start was started")


async def test_refused_commands_of_a_client_that_never_reads_cost_a_bounded_buffer() -> None:
    """Nothing that is owed to a reader escapes the budget, or comes in a message of any size."""
    num_commands = 30_000
    num_sent = 0

    async def flood() -> AsyncIterator[pb.GenerateRequest]:
        nonlocal num_sent
        for num_sent in range(1, num_commands + 1):
            start = start_of([40], request_id="")
            yield pb.GenerateRequest(start=start) if num_sent % 2 else pb.GenerateRequest()

    call = GenerationCall(_NoStarter())
    reading = asyncio.create_task(call.read(flood()))
    await until(lambda: not call._room.is_set())
    num_read = num_sent
    for _ in range(100):  # it would go on in its next turn
        await asyncio.sleep(0)
    assert (num_sent, reading.done()) == (num_read, False)
    # Each refusal counts END_TOKENS and its text, 3 tokens in the mean of these two; the last one crossed the budget.
    assert num_sent == MAX_UNREAD_TOKENS // (END_TOKENS + 3) + 1
    assert 0 < call._num_owed_tokens - MAX_UNREAD_TOKENS <= 2 * END_TOKENS
    messages = [pb.GenerateResponse(events=events) async for events in call.messages()]
    assert sum(len(message.events) for message in messages) == num_commands
    assert max(message.ByteSize() for message in messages) < 1 << 19
    assert call._num_owed_tokens == 0


async def test_long_refused_names_come_in_messages_of_their_own(tmp_path: Path) -> None:
    async with running_daemon(tmp_path) as daemon:
        call = daemon.call()

        async def read() -> list[int]:
            return [message.ByteSize() async for message in call.raw]

        # Meanwhile: of a client that reads nothing, nothing more is read either.
        reading = asyncio.create_task(read())
        for number in range(20):
            await call.start(str(number) * 300_000, [40])
        (slow,) = await _calls(daemon)
        await call.done()
        sizes = await reading
        assert slow._num_owed_tokens == 0
    assert len(sizes) == 20


class _Link:
    def __init__(self) -> None:
        self.commands: list[Command] = []

    def send(self, command: Command) -> None:
        self.commands.append(command)

    def forget(self, request_id: int) -> None:
        pass


def test_what_a_waiting_generation_is_told_is_joined() -> None:
    """Credit and updates that come before the engine has it take no room each."""
    told = Generation("a", RuntimeMetrics(), lambda _: None, lambda _: None)
    for _ in range(1000):
        told.credit(pb.AddCredit(request_id="a", tokens=2))
        told.update(pb.UpdateGeneration(request_id="a", priority=1))
    told.update(pb.UpdateGeneration(request_id="a", max_new_tokens=5))
    link = _Link()
    request = Request(7, [40], SamplingParams(), StopParams(1), credit_tokens=0)
    told.submitted(link, request, [], sends_logprobs=False)
    assert link.commands == [UpdateRequest(7, 1, 5), AddCredit(7, 2000)]


async def test_slow_reader_gets_steps_joined_and_loses_nothing(tmp_path: Path) -> None:
    async with running_daemon(tmp_path, num_blocks=2048) as daemon:
        call = daemon.call()
        prompt = list(range(3, 103))
        for number in range(32):
            await call.start(str(number), prompt, max_new_tokens=400, ignore_end_tokens=True)
        (slow,) = await _calls(daemon)
        await until(lambda: not slow._running)
        seen = await call.finish()
        assert len(seen) == 32
        for one in seen.values():
            assert one.token_ids[0] == prompt * 4
            assert one.reason == "LENGTH"


async def _calls(daemon: Daemon) -> list[GenerationCall]:
    await until(lambda: bool(daemon.runtime._calls))
    return list(daemon.runtime._calls)


class _SlowText:
    """A model's text side that takes for large prompts as long as the test wants."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.go_on = threading.Event()

    def encode(self, text: str) -> list[int]:
        if len(text) > LARGE_START_BYTES:
            assert self.go_on.wait(HANG_S)
        found: list[int] = self._model.encode(text)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


async def test_small_prompt_waits_for_no_large_one_to_be_tokenized(tmp_path: Path) -> None:
    async with running_daemon(tmp_path) as daemon:
        served = daemon.runtime.served
        assert served is not None
        text = _SlowText(served.text.model)
        slow = EngineText(text, served.text.vocab_size)  # type: ignore[arg-type]
        daemon.runtime.keeper.served = replace(served, text=slow)
        call = daemon.call()
        for name in ("large", "large too", "large as well"):
            await call.start(name, "a" * (LARGE_START_BYTES + 1))
        await call.start("small", "hello", max_new_tokens=3)
        try:
            async with asyncio.timeout(HANG_S / 2):
                assert (await call.read_to_end("small")).reason == "LENGTH"
        finally:
            text.go_on.set()
        seen = await call.finish()
        assert reason_of(seen["large too"].error) == "PROMPT_TOO_LONG"
