"""A generation outlives the runtime that it ran on: it goes on elsewhere, and its client sees nothing but a pause."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from millrace.runtime.v1 import runtime_pb2 as pb
from millrace.runtime.v1 import runtime_pb2_grpc

from runtime_service.tenant_queue import TenantQueue
from shared.errors import from_status, reason_of
from tests.runtime_service.daemon import TOKENIZER, Call, start_of, until
from tests.runtime_service.echo_engine import CRASH
from tests.runtime_service.gateway.running_gateway import (
    TEXT,
    Unsendable,
    is_whole,
    kill,
    running_fleet,
    running_gateway,
)


async def start_thirty(call: Call) -> None:
    """Starts generations that have begun, and cannot end before they are let go on."""
    for number in range(30):
        await call.start(str(number), [40, number + 41], max_new_tokens=200, credit_tokens=100)
    await call.read_until(lambda: min(call.num_tokens(str(n)) for n in range(30)) > 5)


async def let_all_go_on(call: Call) -> None:
    for number in range(30):
        await call.let_go_on(str(number))


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


async def test_generation_that_waits_keeps_its_room_however_much_came_after_it(
    tmp_path: Path,
) -> None:
    """Each look for a runtime is a new one, and its place is still its own."""
    async with running_fleet(tmp_path, num_runtimes=1) as fleet:
        room = fleet.gateway._waiting_tokens = TenantQueue(5)
        held = fleet.daemons[0].store.root / "held"
        held.touch()
        os.kill(fleet.daemons[0].client.pid, signal.SIGKILL)
        await fleet.usable(0)
        call = fleet.call()
        await call.start("short", [40, 41], max_new_tokens=10)
        await call.start("long", [50, 51] * 10, max_new_tokens=10)
        await call.start("late", [60, 61], max_new_tokens=10)
        error = from_status((await call.read_to_end("late")).error)
        assert error.reason == "QUEUE_FULL"
        fleet.gateway._try_all_again()
        assert (len(fleet.gateway._waiting), room.num_tokens) == (2, 22)
        held.unlink()
        seen = await call.finish()
        assert room.num_tokens == 0
    is_whole(seen["short"], [40, 41], 10)
    is_whole(seen["long"], [50, 51] * 10, 10)


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
