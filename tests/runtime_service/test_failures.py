"""Every stream ends exactly once, whatever dies, hangs, stops reading or stops."""

import asyncio
import errno
import os
import signal
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from grpc_health.v1 import health_pb2
from millrace.runtime.v1 import runtime_pb2 as pb

from runtime_service.engine_client import EngineClient
from runtime_service.engine_core import OnPhase
from runtime_service.engine_messages import AddCredit, Command, UpdateRequest
from runtime_service.engine_starter import OnLost
from runtime_service.generation import Generation
from runtime_service.generation_call import END_TOKENS, MAX_UNREAD_TOKENS, GenerationCall
from runtime_service.metrics import RuntimeMetrics
from runtime_service.runtime import Runtime
from runtime_service.scheduling.request import Request, SamplingParams, StopParams
from runtime_service.served_engine import EngineText
from runtime_service.start_line import LARGE_START_BYTES, MAX_PREPARED_TOKENS, MIN_PREPARED_TOKENS
from shared.engine import EngineManifest, EngineSelector
from shared.errors import (
    ArchMismatch,
    EngineLost,
    EngineNotFound,
    QueueFull,
    from_status,
    reason_of,
)
from tests.runtime_service.daemon import (
    ENDLESS,
    ENDLESS_TOKENS,
    FP32,
    HANG_S,
    Daemon,
    publish_echo,
    running_daemon,
    start_of,
    until,
)
from tests.runtime_service.echo_engine import CRASH, HANG, RAISE

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def still_works(daemon: Daemon) -> None:
    """A new call gets its tokens."""
    call = daemon.call()
    await call.start("after", [40, 41], max_new_tokens=4)
    seen = await call.finish()
    assert seen["after"].token_ids[0] == [40, 41, 40, 41]


async def test_killed_engine_ends_every_stream_once_and_comes_back(tmp_path: Path) -> None:
    async with running_daemon(tmp_path, step_s=0.005, **ENDLESS) as daemon:
        health = daemon.health()
        assert (await health.read()).status == SERVING
        calls = [daemon.call() for _ in range(3)]
        for call in calls:
            for number in range(10):
                await call.start(str(number), [40, 41], max_new_tokens=ENDLESS_TOKENS)
        for call in calls:
            await call.read_until(lambda call=call: call.num_tokens("9") > 3)  # type: ignore[misc]
        os.kill(daemon.client.pid, signal.SIGKILL)
        for call in calls:
            seen = await call.finish()
            assert [s.num_terminal for s in seen.values()] == [1] * 10
            for one in seen.values():
                error = from_status(one.error)
                assert error.reason == "ENGINE_LOST"
                assert error.retry_after_s
                assert "SIGKILL" in error.fields["problem"]
        assert (await health.read()).status == NOT_SERVING
        assert (await health.read()).status == SERVING
        await still_works(daemon)
        assert daemon.runtime.metrics.engine_restarts == 1


@pytest.mark.parametrize(
    ("token", "problem"),
    [(CRASH, "exited with status 7"), (RAISE, "unforeseen"), (HANG, "no step ended")],
    ids=["crash", "raise", "hang"],
)
async def test_engine_that_fails_is_restarted(tmp_path: Path, token: int, problem: str) -> None:
    async with running_daemon(tmp_path) as daemon:
        client, pid = daemon.client, daemon.client.pid
        call = daemon.call()
        await call.start("waits", [40], credit_tokens=0)
        await call.start("culprit", [40, token])
        if token == HANG:
            await until(lambda: len(client._generations) == 2)
            client._step_timeout_s = 0.1
        seen = await call.finish()
        for one in seen.values():
            assert reason_of(one.error) == "ENGINE_LOST"
            assert problem in one.error.message
        await until(lambda: daemon.runtime.served is not None)
        assert daemon.client.pid != pid
        await still_works(daemon)


async def test_starts_are_refused_while_the_engine_restarts(tmp_path: Path) -> None:
    async with running_daemon(tmp_path) as daemon:
        os.kill(daemon.client.pid, signal.SIGKILL)
        await until(lambda: daemon.runtime.served is None)
        call = daemon.call()
        await call.start("a", [40])
        await call.start("b", "text")
        seen = await call.finish()
        assert [reason_of(s.error) for s in seen.values()] == ["ENGINE_LOST"] * 2


async def test_engine_that_cannot_restart_is_tried_again(tmp_path: Path) -> None:
    async with running_daemon(tmp_path) as daemon:
        broken = daemon.store.root / "broken"
        broken.touch()
        os.kill(daemon.client.pid, signal.SIGKILL)

        def refusal() -> str:
            return str(daemon.runtime.keeper._refusal)

        await until(lambda: "sm_90" in refusal())
        broken.unlink()
        await until(lambda: daemon.runtime.served is not None)
        await still_works(daemon)


class _OutOfMemory:
    """What starts engine processes, on a machine that has no memory for the next `times`."""

    def __init__(self, runtime: Runtime, times: int) -> None:
        self._start_client = runtime.keeper._starter._start_client
        self.times_left = times

    async def __call__(
        self, engine: EngineManifest, on_lost: OnLost, on_phase: OnPhase
    ) -> EngineClient:
        if self.times_left:
            self.times_left -= 1
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return await self._start_client(engine, on_lost, on_phase)


class _Held:
    """Starts engine processes once it is let go."""

    def __init__(self, runtime: Runtime) -> None:
        self._start_client = runtime.keeper._starter._start_client
        self.is_reached, self.may_go = asyncio.Event(), asyncio.Event()

    async def __call__(
        self, engine: EngineManifest, on_lost: OnLost, on_phase: OnPhase
    ) -> EngineClient:
        self.is_reached.set()
        await self.may_go.wait()
        return await self._start_client(engine, on_lost, on_phase)


async def test_engine_that_says_what_nobody_understands_ends_every_stream_once_and_comes_back(
    tmp_path: Path,
) -> None:
    async with running_daemon(tmp_path, step_s=0.005, **ENDLESS) as daemon:
        call = daemon.call()
        for number in range(4):
            await call.start(str(number), [40, 41], max_new_tokens=ENDLESS_TOKENS)
        await call.read_until(lambda: all(call.num_tokens(str(n)) for n in range(4)))
        pid = daemon.client.pid
        with structlog.testing.capture_logs() as logs:
            daemon.client._process.link._reader.feed_data(b"\x01\x00\x00\x00\xff")
            seen = await call.finish()
            await until(lambda: daemon.runtime.served is not None)
        assert [reason_of(one.error) for one in seen.values()] == ["ENGINE_LOST"] * 4
        assert "read_engine" in [log.get("task") for log in logs]
        assert daemon.client.pid != pid
        await still_works(daemon)


async def test_status_tells_the_phases_of_a_load_while_it_goes_on(tmp_path: Path) -> None:
    async with running_daemon(tmp_path) as daemon:
        held = daemon.runtime.keeper._starter._start_client = _Held(daemon.runtime)
        await daemon.runtime.unload()
        loading = asyncio.create_task(daemon.load())
        await held.is_reached.wait()
        seen = [await daemon.stub.GetStatus(pb.GetStatusRequest()) for _ in range(2)]
        held.may_go.set()
        await loading
        done = await daemon.stub.GetStatus(pb.GetStatusRequest())
    assert {status.state for status in seen} == {pb.RUNTIME_STATE_LOADING}
    for status in seen:
        assert [phase.name for phase in status.startup] == ["find_engine", "start_process"]
    spent = [status.startup[1].duration.ToNanoseconds() for status in seen]
    assert 0 < spent[0] < spent[1]
    assert [phase.name for phase in done.startup][:2] == ["find_engine", "start_process"]


async def test_status_tells_what_the_engine_process_does_while_it_loads(tmp_path: Path) -> None:
    async with running_daemon(tmp_path) as daemon:
        held = daemon.store.root / "held"
        held.touch()
        await daemon.runtime.unload()
        loading = asyncio.create_task(daemon.load())
        async with asyncio.timeout(HANG_S):
            status = await daemon.stub.GetStatus(pb.GetStatusRequest())
            while not status.startup or status.startup[-1].name != "load_weights":
                status = await daemon.stub.GetStatus(pb.GetStatusRequest())
        later = await daemon.stub.GetStatus(pb.GetStatusRequest())
        held.unlink()
        await loading
        done = await daemon.stub.GetStatus(pb.GetStatusRequest())
    so_far = ["find_engine", "start_process", "import", "load_weights"]
    assert [phase.name for phase in later.startup] == so_far
    assert later.startup[3].duration.ToNanoseconds() > status.startup[3].duration.ToNanoseconds()
    # What is over stands.
    assert later.startup[2] == status.startup[2]
    assert [phase.name for phase in done.startup] == [*so_far, "warm_up"]


async def test_engine_comes_back_when_its_process_could_not_be_started(tmp_path: Path) -> None:
    """Whatever a restart fails with, it is tried again."""
    async with running_daemon(tmp_path) as daemon:
        starter = daemon.runtime.keeper._starter._start_client = _OutOfMemory(daemon.runtime, 2)
        with structlog.testing.capture_logs() as logs:
            os.kill(daemon.client.pid, signal.SIGKILL)
            await until(lambda: daemon.runtime.served is None)
            await until(lambda: daemon.runtime.served is not None)
        failed = [log for log in logs if log["event"] == "engine_restart_failed"]
        assert [type(log["exc_info"]) for log in failed] == [OSError, OSError]
        assert starter.times_left == 0
        await still_works(daemon)


async def test_old_engine_comes_back_however_the_new_one_fails(tmp_path: Path) -> None:
    """Also where it does not come back at once."""
    async with running_daemon(tmp_path) as daemon:
        publish_echo(daemon.store, "second")
        daemon.runtime.keeper._starter._start_client = _OutOfMemory(daemon.runtime, 3)
        with pytest.raises(OSError, match="allocate"):
            await daemon.load("second")
        assert daemon.runtime.state == pb.RUNTIME_STATE_LOADING
        await until(lambda: daemon.runtime.served is not None)
        assert daemon.runtime.served is not None
        assert daemon.runtime.served.engine.model == "echo"
        await still_works(daemon)


async def test_another_engine_is_served_while_the_lost_one_cannot_be(tmp_path: Path) -> None:
    """Trying again blocks nobody: another engine can be loaded meanwhile, or none."""
    async with running_daemon(tmp_path) as daemon:
        publish_echo(daemon.store, "second")
        start_client, failed = daemon.runtime.keeper._starter._start_client, asyncio.Event()

        async def start(engine: EngineManifest, on_lost: OnLost, on_phase: OnPhase) -> EngineClient:
            if engine.model == "echo":
                failed.set()
                raise EngineLost(problem="it does not start any more")
            return await start_client(engine, on_lost, on_phase)

        daemon.runtime.keeper._starter._start_client = start
        os.kill(daemon.client.pid, signal.SIGKILL)
        await failed.wait()
        async with asyncio.timeout(HANG_S):
            await daemon.load("second")
        assert daemon.runtime.served is not None
        assert daemon.runtime.served.engine.model == "second"
        await still_works(daemon)
        async with asyncio.timeout(HANG_S):
            await daemon.runtime.unload()
        assert daemon.runtime.state == pb.RUNTIME_STATE_IDLE


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
        await until(lambda: not daemon.runtime._line._num_prepared_tokens)
        await still_works(daemon)


async def test_full_queue_refuses_with_a_hint_when_to_come_back(tmp_path: Path) -> None:
    async with running_daemon(
        tmp_path, step_s=0.02, max_waiting_tokens=200, max_sequences=1, **ENDLESS
    ) as daemon:
        call = daemon.call()
        await call.start("runs", [40], max_new_tokens=ENDLESS_TOKENS)
        await call.read_until(lambda: call.num_tokens("runs") > 0)
        await call.start("waits", [41] * 150, max_new_tokens=1)
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
        await call.start("held", [41] * 150, max_new_tokens=1, credit_tokens=0)
        await call.start("refused", [41] * 150, max_new_tokens=1, credit_tokens=0)
        await call.read_to_end("refused")
        assert daemon.client.waiting_tokens == 0
        await call.start("runs", [40], max_new_tokens=ENDLESS_TOKENS)
        await call.read_until(lambda: call.num_tokens("runs") > 0)
        await call.start("waits", [42] * 40, max_new_tokens=1)
        await until(lambda: daemon.client.waiting_tokens == 40)
        await call.let_go_on("held")
        await until(lambda: daemon.client.waiting_tokens == 190)
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
        most_running = 128 + 2000 // 11
        assert len(deaf._running) <= most_running
        await still_works(daemon)
        await daemon.freed()
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


async def test_drain_lets_running_generations_finish(tmp_path: Path) -> None:
    async with running_daemon(tmp_path, step_s=0.01) as daemon:
        call = daemon.call()
        await call.start("runs", [40], max_new_tokens=40, credit_tokens=4)
        await call.read_until(lambda: call.num_tokens("runs") > 0)
        draining = asyncio.create_task(daemon.runtime.drain(HANG_S))
        await until(lambda: daemon.runtime.state == pb.RUNTIME_STATE_DRAINING)
        await call.start("late", [41])
        await call.start("late text", "hello")
        for name in ("late", "late text"):
            await call.read_to_end(name)
        await call.let_go_on("runs")
        await call.read_to_end("runs")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read_rest()
        await draining
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert call.seen["runs"].reason == "LENGTH"
    assert reason_of(call.seen["late"].error) == "DRAINING"
    assert reason_of(call.seen["late text"].error) == "DRAINING"


async def test_drain_ends_what_outlives_its_grace(tmp_path: Path) -> None:
    async with running_daemon(tmp_path, step_s=0.02, **ENDLESS) as daemon:
        call = daemon.call()
        await call.start("long", [40], max_new_tokens=ENDLESS_TOKENS)
        await call.start("waits", [40], credit_tokens=0)
        await call.read_until(lambda: call.num_tokens("long") > 0)
        # Before: a call that may still bring commands ends with DRAINING itself.
        await call.done()
        await daemon.runtime.drain(0.1)
        seen = await call.read_rest()
        await daemon.freed()
    assert set(seen) == {"long", "waits"}
    for one in seen.values():
        assert reason_of(one.error) == "DRAINING"
        assert from_status(one.error).retry_after_s


async def test_swap_holds_starts_and_loses_nothing(tmp_path: Path) -> None:
    async with running_daemon(tmp_path, step_s=0.01) as daemon:
        second = publish_echo(daemon.store, "second")
        call = daemon.call()
        await call.start("old", [40], max_new_tokens=30, credit_tokens=4)
        await call.read_until(lambda: call.num_tokens("old") > 0)
        selector = pb.LoadEngineRequest()
        selector.selector.model = "second"
        selector.selector.quant.scheme = "fp32"
        loading = asyncio.create_task(_load(daemon, selector))
        await until(lambda: daemon.runtime.keeper._is_holding)
        await call.start("held", [41], max_new_tokens=3)
        await call.start("held text", "hello", max_new_tokens=3)
        await call.start("cancelled", [41])
        await call.send(cancel=pb.CancelGeneration(request_id="cancelled"))
        assert (await call.read_to_end("cancelled")).reason == "CANCELLED"
        assert "held" not in call.seen
        await call.let_go_on("old")
        assert (await loading).engine.name == second.name
        seen = await call.finish()
        status = await daemon.stub.GetStatus(pb.GetStatusRequest())
    assert len(seen["old"].token_ids[0]) == 30
    assert seen["held"].token_ids[0] == [41] * 3
    assert seen["held text"].reason == "LENGTH"
    assert status.engine.model == "second"


async def test_start_that_ended_while_it_was_held_counts_no_more(tmp_path: Path) -> None:
    """A fleet takes back what an exchange holds up: that must leave room for those who wait for its end."""
    async with running_daemon(tmp_path, step_s=0.01) as daemon:
        call = daemon.call()
        await call.start("old", [40], max_new_tokens=30, credit_tokens=4)
        await call.read_until(lambda: call.num_tokens("old") > 0)
        loading = asyncio.create_task(daemon.load())
        await until(lambda: daemon.runtime.keeper._is_holding)
        line = daemon.runtime._line
        mine, lost = daemon.runtime.open_call(), daemon.runtime.open_call()
        at_once = mine.start(start_of([41], request_id="cancelled at once"))
        at_once.cancel()
        later = mine.start(start_of([41], request_id="cancelled later"))
        lost.start(start_of("hello", request_id="its client is gone"))
        stays = mine.start(start_of([41], request_id="stays", max_new_tokens=2))
        await until(lambda: later.held is not None and stays.held is not None)
        later.cancel()
        daemon.runtime.close_call(lost)
        await until(lambda: line._num_prepared_tokens == MIN_PREPARED_TOKENS)
        assert daemon.runtime.keeper._is_holding
        assert later.error is None
        await call.let_go_on("old")
        await loading
        await until(lambda: stays.is_ended)
        assert stays.error is None
        assert not line._num_prepared_tokens
        daemon.runtime.close_call(mine)


async def _load(daemon: Daemon, request: pb.LoadEngineRequest) -> pb.LoadEngineResponse:
    response: pb.LoadEngineResponse = await daemon.stub.LoadEngine(request)
    return response


async def test_old_engine_comes_back_when_the_new_one_cannot_be_loaded(tmp_path: Path) -> None:
    async with running_daemon(tmp_path) as daemon:
        publish_echo(daemon.store, "bad", arch_error=True)
        with pytest.raises(ArchMismatch):
            await daemon.load("bad")
        assert daemon.runtime.served is not None
        assert daemon.runtime.served.engine.model == "echo"
        await still_works(daemon)


async def test_engine_that_is_not_there_changes_nothing(tmp_path: Path) -> None:
    async with running_daemon(tmp_path) as daemon:
        pid = daemon.client.pid
        with pytest.raises(EngineNotFound):
            await daemon.load("nothing")
        with pytest.raises(ArchMismatch, match="--arch sm_90"):
            await daemon.runtime.load(EngineSelector("echo", "sm_90", FP32), "")
        assert daemon.client.pid == pid
        await still_works(daemon)


async def test_swap_that_is_given_up_while_it_waits_changes_nothing(tmp_path: Path) -> None:
    async with running_daemon(tmp_path, step_s=0.01) as daemon:
        pid = daemon.client.pid
        call = daemon.call()
        await call.start("a", [40], max_new_tokens=60, credit_tokens=4)
        await call.read_until(lambda: call.num_tokens("a") > 0)
        loading = asyncio.create_task(daemon.load())
        await until(lambda: daemon.runtime.keeper._is_holding)
        loading.cancel()
        await still_works(daemon)
        await call.let_go_on("a")
        assert (await call.finish())["a"].reason == "LENGTH"
        assert daemon.client.pid == pid


async def test_unloaded_runtime_refuses_until_it_is_loaded(tmp_path: Path) -> None:
    async with running_daemon(tmp_path, step_s=0.01) as daemon:
        call = daemon.call()
        await call.start("runs", [40], max_new_tokens=20)
        await call.read_until(lambda: call.num_tokens("runs") > 0)
        unloading = asyncio.create_task(_unload(daemon))
        assert (await call.read_to_end("runs")).reason == "LENGTH"
        await unloading
        await call.start("refused", [40])
        assert reason_of((await call.read_to_end("refused")).error) == "NO_ENGINE"
        status = await daemon.stub.GetStatus(pb.GetStatusRequest())
        assert status.state == pb.RUNTIME_STATE_IDLE
        assert not status.HasField("engine")
        await daemon.load()
        await still_works(daemon)


@pytest.mark.parametrize("how", ["exchange", "unload"])
async def test_client_that_takes_nothing_holds_up_no_engine_for_ever(
    tmp_path: Path, how: str
) -> None:
    async with running_daemon(tmp_path, exchange_s=0.2) as daemon:
        publish_echo(daemon.store, "second")
        call = daemon.call()
        await call.start("stalled", [40], max_new_tokens=30, credit_tokens=4)
        await call.read_until(lambda: call.num_tokens("stalled") == 4)
        async with asyncio.timeout(HANG_S):
            await (daemon.load("second") if how == "exchange" else daemon.runtime.unload())
        error = from_status((await call.read_to_end("stalled")).error)
        assert (error.reason, error.fields["problem"]) == ("ENGINE_LOST", "it is served no more")
        if how == "exchange":
            await still_works(daemon)


async def test_load_that_finds_nothing_says_nothing_of_another_that_goes_on(tmp_path: Path) -> None:
    async with running_daemon(tmp_path) as daemon:
        runtime = daemon.runtime
        await runtime.unload()
        loading = asyncio.create_task(daemon.load())
        await until(runtime.keeper._exchange.locked)
        with pytest.raises(EngineNotFound):
            await daemon.load("nothing")
        assert runtime.state != pb.RUNTIME_STATE_IDLE
        await loading
        assert runtime.state == pb.RUNTIME_STATE_SERVING


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


async def _unload(daemon: Daemon) -> None:
    await daemon.stub.UnloadEngine(pb.UnloadEngineRequest())


async def test_storm_of_cancels_leaves_nothing_behind(tmp_path: Path) -> None:
    async with running_daemon(tmp_path) as daemon:
        call = daemon.call()
        for number in range(300):
            await call.start(str(number), [40, 41, 42], max_new_tokens=200)
            if number % 3:
                await call.send(cancel=pb.CancelGeneration(request_id=str(number)))
        seen = await call.finish()
        assert [s.num_terminal for s in seen.values()] == [1] * 300
        await daemon.freed()
        assert daemon.client.stats is not None
        assert daemon.client.stats.num_free_blocks == 256
        assert daemon.client.waiting_tokens == 0
        assert not daemon.client._generations
