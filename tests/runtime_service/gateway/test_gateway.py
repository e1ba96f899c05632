"""Many runtimes look like one."""

import asyncio
from pathlib import Path

import grpc
import pytest
from millrace.runtime.v1 import runtime_pb2 as pb

from shared.errors import from_status, reason_of
from tests.runtime_service.daemon import ENDLESS, ENDLESS_TOKENS, HANG_S, Call, Seen, until
from tests.runtime_service.gateway.running_gateway import is_whole, running_fleet


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


async def test_prompt_comes_again_to_the_runtime_that_it_first_went_to(tmp_path: Path) -> None:
    """Whatever had least to do then, and though the hash may name another."""
    async with running_fleet(tmp_path, 3) as fleet:
        call = fleet.call()
        await call.start("busy", [40], max_new_tokens=20, credit_tokens=1)
        await call.read_until(lambda: call.num_tokens("busy") > 0)
        for number in range(24):
            homes = []
            for name in (f"{number} first", f"{number} again"):
                before = [daemon.runtime.metrics.generated_tokens for daemon in fleet.daemons]
                await call.start(name, [40, number + 41], max_new_tokens=2)
                await call.read_to_end(name)
                after = [daemon.runtime.metrics.generated_tokens for daemon in fleet.daemons]
                homes.append([now - then for now, then in zip(after, before, strict=True)])
            assert homes[0] == homes[1]
        await call.let_go_on("busy")
        await call.finish()


async def test_prompt_that_every_runtime_refused_is_known_at_none(tmp_path: Path) -> None:
    """It goes where least is to do: which of them refused it says nothing of their caches."""
    async with running_fleet(tmp_path, poll_s=HANG_S, max_waiting_tokens=8) as fleet:
        call, names = fleet.call(), [str(number) for number in range(24)]
        for number, name in enumerate(names):
            prompt = [40, 41, 42, number + 43]
            await call.start(name, prompt, max_new_tokens=2, credit_tokens=0)
        await call.read_until(lambda: sum(one.num_terminal for one in call.seen.values()) >= 18)
        refused = [name for name in names if call.seen.get(name, Seen()).num_terminal]
        for name in set(names) - set(refused):
            await call.send(cancel=pb.CancelGeneration(request_id=name))
            await call.read_to_end(name)
        await call.start("busy", [40] * 500, max_new_tokens=20, credit_tokens=1)
        await call.read_until(lambda: call.num_tokens("busy") > 0)
        busy = fleet.busiest().runtime.metrics
        num_before = busy.generated_tokens
        for name in refused:
            await call.start(f"{name} again", [40, 41, 42, int(name) + 43], max_new_tokens=2)
            await call.read_to_end(f"{name} again")
        assert busy.generated_tokens == num_before
        await call.let_go_on("busy")
        await call.finish()


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
