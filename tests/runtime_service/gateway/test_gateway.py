"""Many runtimes look like one, and the loss of one is not seen."""

import asyncio
import os
import signal
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from millrace.runtime.v1 import runtime_pb2 as pb
from millrace.runtime.v1 import runtime_pb2_grpc

from shared.errors import from_status, reason_of
from tests.runtime_service.daemon import (
    ENDLESS,
    ENDLESS_TOKENS,
    HANG_S,
    TOKENIZER,
    Call,
    Seen,
    start_of,
    until,
)
from tests.runtime_service.echo_engine import CRASH
from tests.runtime_service.gateway.running_gateway import (
    RunningGateway,
    kill,
    running_fleet,
    running_gateway,
)

TEXT = "Zwölf Boxkämpfer 🙂 jagen STO Viktor; "


def is_whole(seen: Seen, prompt: list[int], num_tokens: int) -> None:
    """Asserts that nothing is missing and nothing came twice."""
    assert seen.finished is not None, seen.error
    expected = (prompt * (num_tokens // len(prompt) + 1))[:num_tokens]
    assert seen.token_ids[0] == expected
    assert seen.finished.usage.generated_tokens == num_tokens
    assert seen.finished.usage.prompt_tokens == seen.prompt_tokens == len(prompt)


async def test_generations_run_over_the_fleet_as_on_one_runtime(tmp_path: Path) -> None:
    async with running_fleet(tmp_path) as fleet:
        call = fleet.call()
        for number in range(40):
            await call.start(str(number), [40, number + 41], max_new_tokens=20)
        seen = await call.finish()
        for number in range(40):
            is_whole(seen[str(number)], [40, number + 41], 20)
        engine = fleet.daemons[0].runtime.served
        assert engine is not None
        for message in call.messages:
            for event in message.events:
                if event.HasField("started"):
                    assert event.started.generation_id
                    assert event.started.engine == engine.engine.name
        served = [daemon.runtime.metrics.generated_tokens for daemon in fleet.daemons]
        assert sum(served) == 800
        assert min(served) > 0
        timings = seen["0"].finished.timings  # type: ignore[union-attr]
        first_ns = timings.time_to_first_token.ToNanoseconds()
        assert 0 < timings.queued.ToNanoseconds() <= first_ns <= timings.total.ToNanoseconds()


async def start_thirty(call: Call) -> None:
    """Starts generations that have begun, and cannot end before they are let go on."""
    for number in range(30):
        await call.start(str(number), [40, number + 41], max_new_tokens=200, credit_tokens=100)
    await call.read_until(lambda: min(call.num_tokens(str(n)) for n in range(30)) > 5)


async def let_all_go_on(call: Call) -> None:
    for number in range(30):
        await call.let_go_on(str(number))


class Unsendable(deque[pb.GenerateRequest]):
    """What cannot be sent, for a reason that nobody thought of."""

    def popleft(self) -> pb.GenerateRequest:
        raise RuntimeError("nobody thought of this")


async def test_streams_that_begin_differently_are_shared_out_evenly(tmp_path: Path) -> None:
    async with running_fleet(tmp_path, 3) as fleet:
        call, names = fleet.call(), [str(number) for number in range(9)]
        for number, name in enumerate(names):
            await call.start(name, [40, number + 41], max_new_tokens=20, credit_tokens=1)
        await call.read_until(lambda: all(call.num_tokens(name) for name in names))
        assert [fleet.runs_on(daemon) for daemon in fleet.daemons] == [3, 3, 3]
        for name in names:
            await call.let_go_on(name)
        seen = await call.finish()
    assert {one.reason for one in seen.values()} == {"LENGTH"}


async def test_streams_survive_a_command_that_cannot_be_sent(tmp_path: Path) -> None:
    """Whoever writes to a runtime fails, and no command would reach it any more: what ran there goes on elsewhere."""
    async with running_fleet(tmp_path, step_s=0.004) as fleet:
        call = fleet.call()
        await start_thirty(call)
        odd = next(link for link in fleet.fleet if link.num_runs)
        (opened,) = odd._calls.values()
        opened.outbox = Unsendable([pb.GenerateRequest()])
        with structlog.testing.capture_logs() as logs:
            opened.has_outbox.set()
            await let_all_go_on(call)
            seen = await call.finish()
        for number in range(30):
            is_whole(seen[str(number)], [40, number + 41], 200)
        assert "write_runtime" in [log.get("task") for log in logs]


async def test_what_a_runtime_holds_while_it_exchanges_its_engine_runs_elsewhere(
    tmp_path: Path,
) -> None:
    """A rolling version costs nobody a load: what came before the gateway's next look is moved."""
    async with running_fleet(tmp_path, step_s=0.004) as fleet:
        call = fleet.call()
        await call.start("old", [40, 41], credit_tokens=1, max_new_tokens=5)
        await call.read_until(lambda: call.num_tokens("old") == 1)
        rolling = fleet.busiest()
        link = next(link for link in fleet.fleet if link.address == rolling.server.address)
        look, is_blind, sees = link._look, asyncio.Event(), asyncio.Event()

        async def look_late() -> None:
            is_blind.set()
            await sees.wait()
            await look()

        link._look = look_late  # type: ignore[method-assign]
        await is_blind.wait()
        loading = asyncio.create_task(rolling.load())
        await until(lambda: rolling.runtime.keeper._is_holding)
        for number in range(30):
            await call.start(str(number), [40, number + 41], max_new_tokens=20)
        await until(lambda: fleet.runs_on(rolling) > 1)
        sees.set()
        for number in range(30):
            is_whole(await call.read_to_end(str(number)), [40, number + 41], 20)
        assert rolling.runtime.keeper._is_holding
        assert fleet.runs_on(rolling) == 1
        assert fleet.sample("moved_generations_total", reason="NO_ENGINE") > 0
        await call.send(credit=pb.AddCredit(request_id="old", tokens=10))
        is_whole(await call.read_to_end("old"), [40, 41], 5)
        await loading


@pytest.mark.parametrize("how", ["process", "engine"])
async def test_streams_survive_the_loss_of_their_runtime(tmp_path: Path, how: str) -> None:
    async with running_fleet(tmp_path, step_s=0.004) as fleet:
        call = fleet.call()
        await start_thirty(call)
        lost = fleet.busiest()
        num_moved = fleet.runs_on(lost)
        assert num_moved > 0
        if how == "process":
            await kill(lost)
        else:
            os.kill(lost.client.pid, signal.SIGKILL)
        await let_all_go_on(call)
        seen = await call.finish()
        for number in range(30):
            is_whole(seen[str(number)], [40, number + 41], 200)
        events = [event for message in call.messages for event in message.events]
        assert sum(event.HasField("started") for event in events) == 30
        moved = sum(
            sample.value
            for family in fleet.registry.collect()
            for sample in family.samples
            if sample.name == "millrace_gateway_moved_generations_total"
        )
        assert moved == num_moved
        (other,) = (daemon for daemon in fleet.daemons if daemon is not lost)
        await other.freed()


@pytest.mark.parametrize("cut", range(3, 40, 4))
async def test_text_goes_on_where_it_broke_off(tmp_path: Path, cut: int) -> None:
    """Inside a character of several bytes, and inside what may become a stop string."""
    prompt = TOKENIZER.encode(TEXT).ids
    async with running_fleet(tmp_path, step_s=0.002) as fleet:
        call = fleet.call()
        await call.start("a", TEXT, max_new_tokens=2 * len(prompt), credit_tokens=cut)
        await call.start("b", TEXT, max_new_tokens=300, strings=["STOP", "r; Zwölf"])
        await call.read_until(lambda: call.num_tokens("a") == cut)
        await kill(next(d for d in fleet.daemons if fleet.runs_on(d)))
        await call.let_go_on("a")
        seen = await call.finish()
    is_whole(seen["a"], prompt, 2 * len(prompt))
    assert seen["a"].text[0] == TEXT * 2
    assert seen["b"].reason == "STOP_STRING"
    assert seen["b"].text[0] == TEXT.removesuffix("r; ")


async def test_samples_logprobs_and_credit_survive(tmp_path: Path) -> None:
    prompt = [40, 41, 42]
    async with running_fleet(tmp_path, step_s=0.004) as fleet:
        call = fleet.call()
        sampling = pb.SamplingParams(n=3, top_logprobs=1, prompt_logprobs=True, seed=1)
        await call.start("a", prompt, max_new_tokens=60, sampling=sampling, credit_tokens=30)
        await call.read_until(lambda: call.num_tokens("a") == 30)
        await kill(fleet.busiest())
        await call.send(credit=pb.AddCredit(request_id="a", tokens=61))
        await call.read_until(lambda: call.num_tokens("a") == 91)
        await call.send(credit=pb.AddCredit(request_id="a", tokens=1000))
        seen = (await call.finish())["a"]
    assert seen.finished is not None, seen.error
    assert [sample.sample_index for sample in seen.finished.samples] == [0, 1, 2]
    assert seen.finished.usage.generated_tokens == 180
    for index in range(3):
        assert seen.token_ids[index] == prompt * 20
        rows = [r for c in seen.chunks if c.sample_index == index for r in c.logprobs]
        assert [row.token_id for row in rows] == prompt * 20
    scored = [row.token_id for chunk in seen.chunks for row in chunk.prompt_logprobs]
    assert scored == prompt[1:]


async def test_credit_beyond_what_a_message_holds_is_no_ones_loss(tmp_path: Path) -> None:
    """A field of 32 bits tells a runtime of credit: a client that gives more goes on as all others do."""
    most = 2**31 - 1
    async with running_fleet(tmp_path, step_s=0.004) as fleet:
        call = fleet.call()
        await call.start("a", [40, 41], max_new_tokens=100, credit_tokens=most)
        for _ in range(2):
            await call.send(credit=pb.AddCredit(request_id="a", tokens=most))
        await call.start("b", [40, 41], max_new_tokens=100)  # beside it: it begins alike
        await call.read_until(lambda: min(call.num_tokens("a"), call.num_tokens("b")) > 5)
        await kill(fleet.busiest())
        seen = await call.finish()
    is_whole(seen["a"], [40, 41], 100)
    is_whole(seen["b"], [40, 41], 100)


async def test_limit_below_the_least_survives_a_loss(tmp_path: Path) -> None:
    """An update may lower the limit below `min_new_tokens`: what goes on elsewhere keeps to it, too."""
    async with running_fleet(tmp_path, step_s=0.004) as fleet:
        call = fleet.call()
        stop = {"min_new_tokens": 100, "max_new_tokens": 200}
        await call.start("a", [40, 41], credit_tokens=5, **stop)
        await call.send(update=pb.UpdateGeneration(request_id="a", max_new_tokens=60))
        await call.read_until(lambda: call.num_tokens("a") == 5)
        await kill(fleet.busiest())
        await call.send(credit=pb.AddCredit(request_id="a", tokens=1000))
        seen = await call.finish()
    is_whole(seen["a"], [40, 41], 60)


async def test_runtime_that_makes_no_sense_is_lost(tmp_path: Path) -> None:
    """One event that cannot be taken ends its call, and all that runs on it is told."""
    async with running_fleet(tmp_path, num_runtimes=1) as fleet:
        served = fleet.daemons[0].runtime.served
        assert served is not None
        mad = _Mad(served.engine.name)
        server = grpc.aio.server()
        runtime_pb2_grpc.add_RuntimeServiceServicer_to_server(mad, server)
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        async with running_gateway([address], []) as gateway:
            call = gateway.call()
            await call.start("a", [40, 41], max_new_tokens=9)
            seen = await call.finish()
        await server.stop(0)
    assert reason_of(seen["a"].error) == "ENGINE_LOST"


async def test_generation_that_kills_its_engine_is_given_up(tmp_path: Path) -> None:
    """It takes three engine processes with it, and not the fleet; bystanders go on."""
    async with running_fleet(tmp_path, step_s=0.004) as fleet:
        call = fleet.call()
        for number in range(8):
            await call.start(str(number), [40, number + 41], max_new_tokens=100)
        await call.start("culprit", [40, CRASH])
        seen = await call.finish()
        assert reason_of(seen["culprit"].error) == "ENGINE_LOST"
        restarted = [daemon.runtime.metrics for daemon in fleet.daemons]
        await until(lambda: sum(metrics.engine_restarts for metrics in restarted) == 3)
        for number in range(8):
            is_whole(seen[str(number)], [40, number + 41], 100)


async def test_generation_waits_for_the_only_runtime_to_come_back(tmp_path: Path) -> None:
    async with running_fleet(tmp_path, num_runtimes=1, step_s=0.004) as fleet:
        call = fleet.call()
        await call.start("running", [40, 41], max_new_tokens=80, credit_tokens=10)
        await call.read_until(lambda: call.num_tokens("running") > 5)
        os.kill(fleet.daemons[0].client.pid, signal.SIGKILL)
        await fleet.usable(0)
        await call.start("new", [50, 51], max_new_tokens=10)
        await call.let_go_on("running")
        seen = await call.finish()
    is_whole(seen["running"], [40, 41], 80)
    is_whole(seen["new"], [50, 51], 10)


async def test_generation_that_no_runtime_can_go_on_with_ends_once(tmp_path: Path) -> None:
    async with running_fleet(tmp_path, num_runtimes=1, step_s=0.004, wait_s=0.3) as fleet:
        call = fleet.call()
        await call.start("a", [40, 41], max_new_tokens=400, credit_tokens=10)
        await call.read_until(lambda: call.num_tokens("a") > 5)
        await kill(fleet.daemons[0])
        seen = (await call.finish())["a"]
    error = from_status(seen.error)
    assert (error.reason, seen.num_terminal) == ("ENGINE_LOST", 1)
    assert error.retry_after_s


async def test_model_that_nobody_serves_is_refused_at_once(tmp_path: Path) -> None:
    async with running_fleet(tmp_path, num_runtimes=1) as fleet:
        call = fleet.call()
        await call.start("unknown", [40], model="nothing")
        await call.start("named", [40], max_new_tokens=2, model="echo")
        await call.start("empty", [])
        seen = await call.finish()
    unknown = from_status(seen["unknown"].error)
    assert (unknown.reason, unknown.retry_after_s) == ("MODEL_NOT_SERVED", None)
    assert str(unknown) == "No model 'nothing' is served here; there are: echo."
    assert reason_of(seen["empty"].error) == "INVALID_FIELD"
    is_whole(seen["named"], [40], 2)


async def test_start_that_no_runtime_takes_disturbs_no_other(tmp_path: Path) -> None:
    """Runtimes break the call of a message that is too large, with all that is on it."""
    async with running_fleet(tmp_path, num_runtimes=1, step_s=0.004) as fleet:
        call = fleet.call()
        await call.start("other", [40, 41], max_new_tokens=60, credit_tokens=10)
        await call.read_until(lambda: call.num_tokens("other") > 2)
        await call.start("large", "a" * ((1 << 20) - 50))
        await call.read_to_end("large")
        await call.let_go_on("other")
        seen = await call.finish()
        assert reason_of(seen["large"].error) == "INVALID_FIELD"
        is_whole(seen["other"], [40, 41], 60)
        assert not fleet.sample("moved_generations_total", reason="ENGINE_LOST")


async def test_what_every_runtime_refuses_is_refused_with_a_delay(tmp_path: Path) -> None:
    """A full queue is not the end: the others are asked first."""
    options = {"max_waiting_tokens": 8, "max_sequences": 1, "step_s": 0.02}
    async with running_fleet(tmp_path, **options) as fleet:  # type: ignore[arg-type]
        call = fleet.call()
        for number in range(24):
            # None is begun before all have been asked for, however slowly they come.
            await call.start(str(number), [40, 41, 42, 43], max_new_tokens=8, credit_tokens=0)
        await call.read_until(lambda: sum(one.num_terminal for one in call.seen.values()) > 9)
        for number in range(24):
            if not call.seen.get(str(number), Seen()).num_terminal:
                await call.let_go_on(str(number))
        seen = await call.finish()
        finished = [one for one in seen.values() if one.finished is not None]
        errors = [from_status(one.error) for one in seen.values() if one.finished is None]
        assert len(finished) >= 4
        assert all(daemon.runtime.metrics.generated_tokens for daemon in fleet.daemons)
        assert {error.reason for error in errors} == {"QUEUE_FULL"}
        assert all(error.retry_after_s for error in errors)


async def test_starts_without_credit_that_are_too_many_keep_nobody_else_out(tmp_path: Path) -> None:
    async with running_fleet(tmp_path, 1, poll_s=HANG_S, max_waiting_tokens=8) as fleet:
        call = fleet.call()
        for name in ("held", "too", "many"):
            await call.start(name, [40, 41, 42, 43], max_new_tokens=2, credit_tokens=0)
        await call.read_to_end("many")
        await call.start("after", [40, 41, 42, 43], max_new_tokens=2)
        await call.read_to_end("after")
        for name in ("held", "too"):
            await call.let_go_on(name)
        seen = await call.finish()
    assert from_status(seen["many"].error).reason == "QUEUE_FULL"
    for name in ("held", "too", "after"):
        is_whole(seen[name], [40, 41, 42, 43], 2)


async def test_full_runtime_is_not_asked_again_until_something_leaves_its_queue(
    tmp_path: Path,
) -> None:
    """Refusing is what an overloaded fleet does most: only the first refusal costs the runtime anything."""
    options = {"max_waiting_tokens": 8, "max_sequences": 1, "step_s": 0.002, **ENDLESS}
    async with running_fleet(tmp_path, 1, poll_s=HANG_S, **options) as fleet:  # type: ignore[arg-type]
        call, metrics = fleet.call(), fleet.daemons[0].runtime.metrics
        await call.start("running", [40, 41], max_new_tokens=ENDLESS_TOKENS)
        await call.read_until(lambda: call.num_tokens("running") > 0)
        for name in ("waiting", "next", "refused"):
            await call.start(name, [40, 41, 42, 43], max_new_tokens=8)
        await call.read_to_end("refused")
        assert metrics.num_ended("QUEUE_FULL") == 1
        late = [str(number) for number in range(50)]
        for name in late:
            await call.start(name, [40, 41, 42, 43], max_new_tokens=8)
        errors = [from_status((await call.read_to_end(name)).error) for name in late]
        assert {error.reason for error in errors} == {"QUEUE_FULL"}
        assert all(error.retry_after_s for error in errors)
        assert metrics.num_ended("QUEUE_FULL") == 1
        await call.send(cancel=pb.CancelGeneration(request_id="running"))
        await call.read_until(lambda: call.num_tokens("waiting") > 0)
        await call.start("after", [40, 41], max_new_tokens=2)
        seen = await call.finish()
    is_whole(seen["after"], [40, 41], 2)


async def test_draining_runtime_gets_nothing_new_and_finishes_what_it_has(tmp_path: Path) -> None:
    async with running_fleet(tmp_path, step_s=0.004) as fleet:
        call = fleet.call()
        for number in range(20):
            await call.start(str(number), [40, number + 41], max_new_tokens=100, credit_tokens=10)
        await call.read_until(lambda: all(call.num_tokens(str(n)) for n in range(20)))
        draining = fleet.daemons[0]
        num_before = fleet.runs_on(draining)
        assert num_before > 0
        task = asyncio.create_task(draining.runtime.drain(HANG_S))
        await fleet.usable(1)
        assert fleet.runs_on(draining) == num_before
        for number in range(20, 30):
            await call.start(str(number), [40, number + 41], max_new_tokens=5)
        await call.read_until(lambda: all(call.num_tokens(str(n)) for n in range(20, 30)))
        assert fleet.runs_on(draining) == num_before
        for number in range(20):
            await call.let_go_on(str(number))
        seen = await call.finish()
        await task
    for number in range(20):
        is_whole(seen[str(number)], [40, number + 41], 100)
    assert not fleet.sample("moved_generations_total", reason="DRAINING")


class _Mute(runtime_pb2_grpc.RuntimeServiceServicer):
    """A runtime that says it serves, begins, and is not heard of again."""

    def __init__(self, engine: str) -> None:
        self._engine = engine
        self.is_mute = asyncio.Event()
        self.was_broken_off = asyncio.Event()

    async def GetStatus(self, request: Any, context: Any) -> pb.GetStatusResponse:
        if self.is_mute.is_set():
            await asyncio.Event().wait()
        status = pb.GetStatusResponse(state=pb.RUNTIME_STATE_SERVING)
        status.engine.name = self._engine
        return status

    async def Generate(self, requests: Any, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        try:
            async for request in requests:
                name = request.start.request_id
                started = pb.GenerationStarted(seed=1, prompt_tokens=2, engine=self._engine)
                tokens = pb.TokenChunk(token_ids=[40, 41, 40])
                events = [pb.Event(request_id=name, started=started),
                          pb.Event(request_id=name, tokens=tokens)]  # fmt: skip
                self.is_mute.set()
                yield pb.GenerateResponse(events=events)
        finally:
            self.was_broken_off.set()


class _Mad(runtime_pb2_grpc.RuntimeServiceServicer):
    """A runtime that tells of samples that nobody asked for."""

    def __init__(self, engine: str) -> None:
        self._engine = engine

    async def GetStatus(self, request: Any, context: Any) -> pb.GetStatusResponse:
        status = pb.GetStatusResponse(state=pb.RUNTIME_STATE_SERVING, runtime_id="mad")
        status.engine.name = self._engine
        return status

    async def Generate(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:
        async for command in request_iterator:
            if command.HasField("start"):
                name = command.start.request_id
                started = pb.GenerationStarted(seed=1, prompt_tokens=2, engine=self._engine)
                tokens = pb.TokenChunk(sample_index=7, token_ids=[1])
                yield pb.GenerateResponse(
                    events=[
                        pb.Event(request_id=name, started=started),
                        pb.Event(request_id=name, tokens=tokens),
                    ]
                )


async def test_silent_runtime_is_lost_and_gets_nothing_new(tmp_path: Path) -> None:
    async with running_fleet(tmp_path, num_runtimes=1) as fleet:
        daemon = fleet.daemons[0]
        assert daemon.runtime.served is not None
        mute = _Mute(daemon.runtime.served.engine.name)
        server = grpc.aio.server()
        runtime_pb2_grpc.add_RuntimeServiceServicer_to_server(mute, server)
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        addresses = [daemon.server.address, address]
        async with running_gateway(addresses, [daemon], silent_s=0.6) as gateway:
            call = gateway.call()
            for number in range(20):
                await call.start(str(number), [40, number + 41], max_new_tokens=9)
            await call.start("moves", [40, 41], max_new_tokens=9)
            await mute.is_mute.wait()
            await gateway.usable(1)
            for number in range(20, 30):
                await call.start(str(number), [40, number + 41], max_new_tokens=9)
            await call.read_until(lambda: all(call.num_tokens(str(n)) for n in range(20, 30)))
            seen = await call.finish()
            await mute.was_broken_off.wait()
            assert gateway.sample("moved_generations_total", reason="ENGINE_LOST") >= 1
        await server.stop(0)
    is_whole(seen["moves"], [40, 41], 9)
    assert all(one.finished is not None for one in seen.values())
    for number in range(20, 30):
        is_whole(seen[str(number)], [40, number + 41], 9)


async def test_cancelled_generations_free_their_blocks_and_end_once(tmp_path: Path) -> None:
    async with running_fleet(tmp_path, step_s=0.002, **ENDLESS) as fleet:
        call = fleet.call()
        for number in range(40):
            await call.start(str(number), [40, number + 41], max_new_tokens=ENDLESS_TOKENS)
        await call.read_until(lambda: call.num_tokens("39") > 2)
        for number in range(40):
            await call.send(cancel=pb.CancelGeneration(request_id=str(number)))
        seen = await call.finish()
        assert {one.reason for one in seen.values()} == {"CANCELLED"}
        for daemon in fleet.daemons:
            await daemon.freed()


async def test_lost_call_frees_its_blocks(tmp_path: Path) -> None:
    async with running_fleet(tmp_path, step_s=0.002, **ENDLESS) as fleet:
        call = fleet.call()
        for number in range(20):
            await call.start(str(number), [40, number + 41], max_new_tokens=ENDLESS_TOKENS)
        await call.read_until(lambda: call.num_tokens("19") > 2)
        call.raw.cancel()
        await until(lambda: fleet.sample("running_generations") == 0)
        for daemon in fleet.daemons:
            await daemon.freed()


async def test_deadline_counts_from_the_start_wherever_it_runs(tmp_path: Path) -> None:
    async with running_fleet(tmp_path, step_s=0.01) as fleet:
        call = fleet.call()
        # It cannot end otherwise: after these tokens it waits for credit.
        start = start_of([40, 41], request_id="a", max_new_tokens=450, credit_tokens=20)
        start.timeout.FromMilliseconds(600)
        await call.send(start=start)
        await call.read_until(
            lambda: call.num_tokens("a") > 5 or bool(call.seen and call.seen["a"].num_terminal)
        )
        await kill(fleet.busiest())
        seen = (await call.finish())["a"]
    assert reason_of(seen.error) == "DEADLINE_EXCEEDED"


async def drained(call: Call) -> dict[str, Seen]:
    """What a call sees to its end, which is an error."""
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await call.read_rest()
    assert ended.value.code() == grpc.StatusCode.UNAVAILABLE
    return call.seen


async def test_gateway_drains(tmp_path: Path) -> None:
    async with running_fleet(tmp_path, step_s=0.004) as fleet:
        call = fleet.call()
        await call.start("short", [40, 41], max_new_tokens=20, credit_tokens=4)
        await call.start("long", [40, 41], max_new_tokens=500, credit_tokens=4)
        await call.read_until(lambda: call.num_tokens("long") > 2)
        draining = asyncio.create_task(fleet.gateway.drain(HANG_S))
        await asyncio.sleep(0)
        await call.start("late", [40, 41])
        await call.read_to_end("late")
        await call.let_go_on("short")
        await call.read_to_end("short")
        await fleet.gateway.drain(0.0)  # as when the grace is over
        seen = await drained(call)
        await draining
    is_whole(seen["short"], [40, 41], 20)
    assert reason_of(seen["long"].error) == "DRAINING"
    assert reason_of(seen["late"].error) == "DRAINING"


async def test_status_is_that_of_one_runtime_and_loading_is_refused(tmp_path: Path) -> None:
    async with running_fleet(tmp_path) as fleet:
        status = await fleet.stub.GetStatus(pb.GetStatusRequest())
        assert status.state == pb.RUNTIME_STATE_SERVING
        assert status.engine.model == "echo"
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await fleet.stub.UnloadEngine(pb.UnloadEngineRequest())
        assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED


# A client that lost its connection.


async def resumed(
    fleet: RunningGateway, generation_id: str, *received: int, **fields: int
) -> tuple[Call, Seen]:
    """What a new call sees of that generation."""
    call = fleet.call()
    await call.send(
        resume=pb.ResumeGeneration(
            request_id="again", generation_id=generation_id, received_tokens=received, **fields
        )
    )
    return call, (await call.finish())["again"]


def generation_id_of(call: Call) -> str:
    events = [event for message in call.messages for event in message.events]
    return next(event.started.generation_id for event in events if event.HasField("started"))


@pytest.mark.parametrize("num_read", [0, 1, 7, 33])
async def test_lost_client_goes_on_after_the_last_token_that_it_has(
    tmp_path: Path, num_read: int
) -> None:
    prompt = TOKENIZER.encode(TEXT).ids
    total = 2 * len(prompt)
    async with running_fleet(tmp_path, step_s=0.002) as fleet:
        call = fleet.call()
        await call.start("a", TEXT, max_new_tokens=total)
        await call.read_until(lambda: call.num_tokens("a") > 40)
        chunks = call.seen["a"].chunks
        num_chunks = next(
            n for n in range(len(chunks) + 1)
            if sum(len(c.token_ids) for c in chunks[:n]) >= num_read
        )  # fmt: skip
        had = sum(len(chunk.token_ids) for chunk in chunks[:num_chunks])
        text = "".join(chunk.text for chunk in chunks[:num_chunks])
        call.raw.cancel()
        _, seen = await resumed(fleet, generation_id_of(call), had)
    assert seen.finished is not None, seen.error
    assert seen.token_ids[0] == (prompt * 2)[had:]
    assert text + seen.text[0] == TEXT * 2
    assert seen.finished.usage.generated_tokens == total
    assert seen.seed == call.seen["a"].seed
    assert fleet.sample("resumed_generations_total") == 1


async def test_resumed_generation_leaves_the_call_that_nobody_reads(tmp_path: Path) -> None:
    """A half-open connection: the old call has not noticed yet."""
    async with running_fleet(tmp_path, step_s=0.004) as fleet:
        old = fleet.call()
        await old.start("a", [40, 41], max_new_tokens=100, credit_tokens=10)
        await old.read_until(lambda: old.num_tokens("a") > 4)
        had = old.num_tokens("a")
        _, seen = await resumed(fleet, generation_id_of(old), had, credit_tokens=1000)
        assert seen.token_ids[0] == ([40, 41] * 50)[had:]
        await old.done()
        await old.read_rest()
        assert old.seen["a"].num_terminal == 0


async def test_finished_generation_can_be_read_again_and_samples_go_on_apart(
    tmp_path: Path,
) -> None:
    async with running_fleet(tmp_path) as fleet:
        call = fleet.call()
        sampling = pb.SamplingParams(n=2, seed=3)
        await call.start("a", [40, 41, 42], max_new_tokens=9, sampling=sampling)
        await call.finish()
        _, seen = await resumed(fleet, generation_id_of(call), 9, 4)
    assert seen.token_ids == {1: ([40, 41, 42] * 3)[4:]}
    assert seen.finished is not None, seen.error
    assert [sample.reason for sample in seen.finished.samples] == [pb.FINISH_REASON_LENGTH] * 2
    assert seen.finished.usage.generated_tokens == 18


async def test_what_cannot_be_resumed_is_refused(tmp_path: Path) -> None:
    async with running_fleet(tmp_path, num_runtimes=1, step_s=0.004) as fleet:
        call = fleet.call()
        await call.start("a", [40, 41], max_new_tokens=300, credit_tokens=10)
        await call.read_until(lambda: call.num_tokens("a") > 4)
        known = generation_id_of(call)
        for generation_id, received, reason in (
            ("nothing", (), "GENERATION_NOT_FOUND"),
            (known, (400,), "INVALID_FIELD"),
            (known, (1, 1), "INVALID_FIELD"),
            (known, (-1,), "INVALID_FIELD"),
        ):
            _, seen = await resumed(fleet, generation_id, *received)
            assert reason_of(seen.error) == reason
        await call.send(cancel=pb.CancelGeneration(request_id="a"))
        assert (await call.finish())["a"].reason == "CANCELLED"
        _, seen = await resumed(fleet, known)
        assert reason_of(seen.error) == "GENERATION_NOT_FOUND"
        runtime = fleet.daemons[0].call()
        await runtime.send(resume=pb.ResumeGeneration(request_id="r", generation_id=known))
        seen = (await runtime.finish())["r"]
        assert reason_of(seen.error) == "GENERATION_NOT_FOUND"


async def test_generation_is_forgotten_after_a_while(tmp_path: Path) -> None:
    async with running_fleet(tmp_path, num_runtimes=1) as fleet:
        addresses = [fleet.daemons[0].server.address]
        async with running_gateway(addresses, fleet.daemons, keep_s=0.05) as forgetful:
            call = forgetful.call()
            await call.start("a", [40, 41], max_new_tokens=3)
            await call.finish()
            kept = forgetful.gateway._kept._items
            await until(lambda: not kept)
            _, seen = await resumed(forgetful, generation_id_of(call), 1)
    assert reason_of(seen.error) == "GENERATION_NOT_FOUND"
