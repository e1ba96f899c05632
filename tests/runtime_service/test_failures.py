"""Every stream ends exactly once, whatever dies, hangs or stops."""

import asyncio
import errno
import os
import signal
from pathlib import Path

import grpc
import pytest
import structlog
from grpc_health.v1 import health_pb2
from millrace.runtime.v1 import runtime_pb2 as pb

from runtime_service.engine_client import EngineClient
from runtime_service.engine_core import OnPhase
from runtime_service.engine_starter import OnLost
from runtime_service.runtime import Runtime
from shared.engine import EngineManifest
from shared.errors import EngineLost, from_status, reason_of
from tests.runtime_service.daemon import (
    ENDLESS,
    ENDLESS_TOKENS,
    HANG_S,
    publish_echo,
    running_daemon,
    still_works,
    until,
)
from tests.runtime_service.echo_engine import CRASH, HANG, RAISE

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


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
        held = daemon.store.root / "held"
        held.touch()
        os.kill(daemon.client.pid, signal.SIGKILL)
        await until(lambda: daemon.runtime.served is None)
        call = daemon.call()
        await call.start("a", [40])
        await call.start("b", "text")
        seen = await call.finish()
        held.unlink()
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
