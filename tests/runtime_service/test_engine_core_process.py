"""The engine process: what it says, and how it ends."""

import asyncio
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from google.rpc import status_pb2

from runtime_service.engine_client import EngineClient
from runtime_service.engine_core import OnPhase
from runtime_service.engine_interpreter import EngineInterpreter
from runtime_service.engine_messages import (
    AddRequest,
    Failed,
    Loading,
    Ready,
    Reply,
    SampleOutput,
    Shutdown,
    StepOutputs,
)
from runtime_service.engine_process import EngineProcess, EngineSpec, start_engine_process
from runtime_service.engine_transport import PeerGone
from runtime_service.metrics import RuntimeMetrics
from runtime_service.scheduling.output import SchedulerOutput
from runtime_service.scheduling.request import Request, SamplingParams, StopParams
from shared.arch import arch_named
from shared.errors import reason_of
from tests.runtime_service.fake_runner import (
    FakeEngine,
    FakeRunner,
    FakeStep,
    small_limits,
    tokens_alone,
)

LOADER = "tests.runtime_service.fake_runner:load_fake_engine"

Start = Callable[[EngineSpec], Awaitable[EngineProcess]]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Starts engine processes and ends them with the test."""
    started = []

    async def start_one(spec: EngineSpec) -> EngineProcess:
        started.append(await start_engine_process(spec))
        return started[-1]

    yield start_one
    for process in started:
        await process.stop()


def fake_spec(overlap: bool = True, **arguments: object) -> EngineSpec:
    return EngineSpec(LOADER, {"limits": small_limits(), **arguments}, overlap=overlap)


def request(request_id: int, num_tokens: int = 20) -> Request:
    sampling = SamplingParams(seed=(1 << 64) - 1 - request_id)
    return Request(request_id, [1, 2, 3, request_id], sampling, StopParams(num_tokens))


def cpu_ticks(pid: int) -> int:
    """Hundredths of a second that a process has computed. Source: proc(5), stat fields 14, 15."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


async def gather(process: EngineProcess, num_finishes: int) -> dict[int, list[SampleOutput]]:
    outputs: dict[int, list[SampleOutput]] = {}
    while num_finishes:
        reply = await process.link.receive()
        assert isinstance(reply, StepOutputs)
        for output in reply.outputs:
            outputs.setdefault(output.request_id, []).append(output)
            num_finishes -= bool(output.finish)
    return outputs


async def loaded(process: EngineProcess) -> tuple[list[str], Reply]:
    """The phases of loading that a process tells, and what it says after them."""
    phases = []
    while isinstance(reply := await process.link.receive(), Loading):
        phases.append(reply.phase)
    return phases, reply


def load_unknown_arch(on_phase: OnPhase) -> None:
    """A loader that fails."""
    arch_named("sm_1")


class FullRunner(FakeRunner):
    """Runs out of memory, as torch tells it."""

    def __init__(self, where: str) -> None:
        super().__init__(small_limits())
        self._where = where

    def warm_up(self) -> None:
        self._need_memory("warm_up")

    def use_idle_time(self) -> bool:
        self._need_memory("idle")
        return False

    def execute(self, step: SchedulerOutput) -> FakeStep:
        self._need_memory("step")
        return super().execute(step)

    def _need_memory(self, where: str) -> None:
        if where == self._where:
            raise RuntimeError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.2 GiB is free. More."
            )


def load_on_full_gpu(where: str, on_phase: OnPhase) -> FakeEngine:
    """A loader of an engine that fills its GPU."""
    runner = FullRunner(where)
    runner._need_memory("load")
    return FakeEngine(runner, small_limits())


async def receive_to_the_end(process: EngineProcess) -> None:
    while True:
        await process.link.receive()


@pytest.mark.parametrize("overlap", [True, False])
async def test_process_serves_what_was_asked(start: Start, overlap: bool) -> None:
    process = await start(fake_spec(overlap))
    phases, ready = await loaded(process)
    assert isinstance(ready, Ready)
    assert ready.limits == small_limits()
    # As it began them, and how long they took.
    assert phases == [name for name, _ in ready.phases] == ["import", "load", "warm_up"]
    requests = [request(n) for n in range(8)]
    process.link.send([AddRequest(r) for r in requests])
    outputs = await gather(process, num_finishes=8)
    for asked in requests:
        drawn = tuple(t for o in outputs[asked.request_id] for t in o.token_ids)
        assert (drawn, outputs[asked.request_id][-1].finish) == tokens_alone(asked)
    process.link.send([Shutdown()])
    assert await process.wait() == 0


async def test_process_says_when_it_is_idle_and_burns_no_cpu(start: Start) -> None:
    process = await start(fake_spec())
    await loaded(process)
    process.link.send([AddRequest(request(0))])
    reply = await process.link.receive()
    while not (isinstance(reply, StepOutputs) and reply.stats.is_idle):
        reply = await process.link.receive()
    async with asyncio.timeout(60):
        spent = 2
        while (
            spent > 1
        ):  # it may be on its way to rest; what is busy while idle spends more in any interval
            before = cpu_ticks(process.pid)
            await asyncio.sleep(0.3)  # an interval to measure, not something to wait for
            spent = cpu_ticks(process.pid) - before


async def test_process_reports_what_failed_and_ends(start: Start) -> None:
    process = await start(fake_spec(fails_at_step=3))
    await loaded(process)
    process.link.send([AddRequest(request(0))])
    reply = await process.link.receive()
    while not isinstance(reply, Failed):
        reply = await process.link.receive()
    assert reason_of(status_pb2.Status.FromString(reply.status)) == "INTERNAL"
    with pytest.raises(PeerGone):
        await process.link.receive()
    assert await process.wait() == 1


async def test_process_reports_an_engine_that_cannot_be_loaded(start: Start) -> None:
    process = await start(EngineSpec(f"{__name__}:load_unknown_arch"))
    _, reply = await loaded(process)
    assert isinstance(reply, Failed)
    assert reason_of(status_pb2.Status.FromString(reply.status)) == "UNSUPPORTED_ARCH"


@pytest.mark.parametrize("where", ["load", "warm_up", "step", "idle"])
async def test_gpu_that_fills_up_is_told_in_a_line_wherever_that_is(
    start: Start, where: str
) -> None:
    spec = EngineSpec(f"{__name__}:load_on_full_gpu", {"where": where}, "tiny-int8")
    process = await start(spec)
    _, reply = await loaded(process)
    if isinstance(reply, Ready):
        assert where in ("step", "idle")
        process.link.send([AddRequest(request(0))])
    while not isinstance(reply, Failed):
        reply = await process.link.receive()
    status = status_pb2.Status.FromString(reply.status)
    assert reason_of(status) == "DEVICE_FULL"
    assert status.message.startswith(
        "The GPU has no room for tiny-int8 (Tried to allocate 2.00 GiB. GPU 0 has 1.2 GiB is free)"
    )


async def test_killed_process_is_seen_by_the_front(start: Start) -> None:
    process = await start(fake_spec())
    await loaded(process)
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(PeerGone):
        await receive_to_the_end(process)
    assert await process.wait() == -signal.SIGKILL


async def test_process_that_crashes_leaves_its_stacks_in_the_daemons_log(
    start: Start, capfd: pytest.CaptureFixture[str]
) -> None:
    process = await start(fake_spec())
    await loaded(process)
    os.kill(process.pid, signal.SIGSEGV)
    assert await process.wait() == -signal.SIGSEGV
    log = capfd.readouterr().err
    assert "Fatal Python error: Segmentation fault" in log
    assert "engine_process.py" in log


async def test_process_ends_when_the_front_closes_its_side(start: Start) -> None:
    process = await start(fake_spec())
    await loaded(process)
    process.link.close()
    assert await process.wait() == 1


_FRONT = f"""
import asyncio, sys
from runtime_service.engine_process import EngineSpec, start_engine_process
from tests.runtime_service.fake_runner import small_limits

async def main():
    spec = EngineSpec({LOADER!r}, {{"limits": small_limits()}})
    process = await start_engine_process(spec)
    await process.link.receive()
    print(process.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def test_process_dies_with_a_killed_front() -> None:
    """Law 7: nothing is left behind that holds the device."""
    with subprocess.Popen([sys.executable, "-c", _FRONT], stdout=subprocess.PIPE) as front:
        assert front.stdout is not None
        engine = os.pidfd_open(int(front.stdout.readline()))
        try:
            front.kill()
            ended, _, _ = select.select([engine], [], [], 60)
            assert ended, "the engine process outlives its front"
        finally:
            os.close(engine)


_WAITING_FRONT = """
import sys
from runtime_service.engine_client import EngineClient
from runtime_service.engine_core import OnPhase
from runtime_service.engine_interpreter import EngineInterpreter

with EngineInterpreter("tests.runtime_service.fake_runner:tell_pid") as waiting:
    sys.stdin.readline()
    if sys.argv[1] == "fails":
        sys.exit("bad settings")
"""


@pytest.mark.parametrize("ending", ["kill", "interrupt", "fails", "returns"])
def test_waiting_process_ends_with_its_front(ending: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _WAITING_FRONT, ending],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as front:
        assert front.stdout is not None
        # Nothing has told it what to load: it runs this while it waits.
        engine = os.pidfd_open(int(front.stdout.readline()))
        try:
            if ending == "kill":
                front.kill()
            elif ending == "interrupt":
                front.send_signal(signal.SIGINT)
            else:
                front.communicate(b"\n")
            ended, _, _ = select.select([engine], [], [], 60)
            assert ended, "the waiting process outlives its front"
        finally:
            os.close(engine)


async def test_first_load_takes_the_waiting_process_and_the_second_starts_its_own() -> None:
    with EngineInterpreter() as waiting:
        first = await start_engine_process(fake_spec(), waiting)
        second = await start_engine_process(fake_spec(), waiting)
        try:
            assert first.pid == waiting.process.pid != second.pid
            for process in (first, second):
                assert isinstance((await loaded(process))[1], Ready)
        finally:
            assert await first.stop() == await second.stop() == -signal.SIGKILL


async def test_waiting_process_that_died_is_not_taken() -> None:
    with EngineInterpreter() as waiting:
        waiting.process.kill()
        waiting.process.wait()
        process = await start_engine_process(fake_spec(), waiting)
        assert process.pid != waiting.process.pid
        assert isinstance((await loaded(process))[1], Ready)
        await process.stop()


def test_waiting_process_is_reaped_where_it_was_not_taken() -> None:
    with EngineInterpreter() as waiting:
        assert waiting.process.poll() is None
    assert waiting.process.returncode == -signal.SIGKILL


async def test_taken_process_outlives_the_block() -> None:
    with EngineInterpreter() as waiting:
        process = await start_engine_process(fake_spec(), waiting)
    assert isinstance((await loaded(process))[1], Ready)
    await process.stop()


class _Leaving:
    """A process that has closed its link and lives on."""

    def __init__(self) -> None:
        self.front, other = socket.socketpair()
        other.close()
        self.process = subprocess.Popen(["sleep", "3600"])

    def take(self) -> bool:
        return True


async def test_process_is_ended_where_its_start_is_cancelled_while_it_leaves() -> None:
    leaving = _Leaving()
    starting = asyncio.create_task(
        EngineClient.start(
            fake_spec(),
            RuntimeMetrics(),
            waiting=leaving,  # type: ignore[arg-type]
            max_waiting_tokens=0,
            load_timeout_s=60.0,
            step_timeout_s=60.0,
            on_lost=lambda client, error: None,
        )
    )
    for _ in range(50):  # turns of the loop: it sees that the link is closed, and waits for the end
        await asyncio.sleep(0)
    starting.cancel()
    await asyncio.wait({starting})
    status = leaving.process.poll()
    leaving.process.kill()  # else what waits for it would keep a test that fails from its end
    assert starting.cancelled()
    assert status == -signal.SIGKILL
