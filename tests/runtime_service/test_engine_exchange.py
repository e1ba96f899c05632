"""A runtime exchanges its engine: what runs finishes, what comes meanwhile waits, a load that fails changes nothing."""

import asyncio
from pathlib import Path

import pytest
from millrace.runtime.v1 import runtime_pb2 as pb

from runtime_service.engine_client import EngineClient
from runtime_service.engine_core import OnPhase
from runtime_service.engine_starter import OnLost
from runtime_service.runtime import Runtime
from runtime_service.start_line import MIN_PREPARED_TOKENS
from shared.engine import EngineManifest, EngineSelector
from shared.errors import ArchMismatch, EngineNotFound, from_status, reason_of
from tests.runtime_service.daemon import (
    FP32,
    HANG_S,
    Daemon,
    publish_echo,
    running_daemon,
    start_of,
    still_works,
    until,
)


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
        await until(lambda: line._prepared.num_tokens == MIN_PREPARED_TOKENS)
        assert daemon.runtime.keeper._is_holding
        assert later.error is None
        await call.let_go_on("old")
        await loading
        await until(lambda: stays.is_ended)
        assert stays.error is None
        assert not line._prepared.num_tokens
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


async def _unload(daemon: Daemon) -> None:
    await daemon.stub.UnloadEngine(pb.UnloadEngineRequest())
