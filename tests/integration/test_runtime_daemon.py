"""The runtime daemon as a process: it starts, serves, registers, loses Redis, drains and exits."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from millrace.artifact.v1 import artifact_pb2_grpc
from millrace.runtime.v1 import runtime_pb2 as pb
from millrace.runtime.v1 import runtime_pb2_grpc

from compiler_service.artifact_service import ArtifactService
from shared.errors import reason_of
from shared.redis import EmbeddedRedis, connect_sync
from shared.store import LocalStore
from tests.runtime_service.daemon import HANG_S, Call, publish_echo, rest_of, start_of, until

ROOT = Path(__file__).parents[2]
# The daemon as it is, but for the engine that its engine process loads.
MAIN = """
import uvloop
from runtime_service.daemon import serve
from runtime_service.settings import RuntimeSettings
from shared.log import configure_logging
configure_logging("info", "json", "runtime")
uvloop.run(serve(RuntimeSettings.load(), "tests.runtime_service.slow_echo:load"))
"""


class Process:
    """A daemon process and a channel to it."""

    def __init__(self, process: asyncio.subprocess.Process, address: str, metrics: str) -> None:
        self.process = process
        self.metrics = metrics
        self.channel = grpc.aio.insecure_channel(
            address, options=[("grpc.max_reconnect_backoff_ms", 200)]
        )
        self.stub: Any = runtime_pb2_grpc.RuntimeServiceStub(self.channel)

    async def serving(self) -> None:
        """Waits until health says SERVING."""
        await self._health(health_pb2.HealthCheckResponse.SERVING)

    async def draining(self) -> None:
        """Waits until health says NOT_SERVING."""
        await self._health(health_pb2.HealthCheckResponse.NOT_SERVING)

    async def _health(self, wanted: int) -> None:
        stub = health_pb2_grpc.HealthStub(self.channel)
        async for answer in stub.Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True):
            if answer.status == wanted:
                return

    async def exit_status(self) -> int:
        """Waits for the process to end."""
        return await asyncio.wait_for(self.process.wait(), HANG_S)


@asynccontextmanager
async def daemon_process(folder: Path, port: int, *flags: str) -> AsyncIterator[Process]:
    """A daemon that serves the slow echo engine of the store in `folder`."""
    store = LocalStore(folder / "store")
    publish_echo(store)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        MAIN,
        *("--listen", f"127.0.0.1:{port}"),
        *("--metrics-listen", f"127.0.0.1:{port + 1}"),
        *("--store", str(store.root), "--model", "echo", "--quant", "fp32", "--arch", "cpu"),
        *flags,
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"},
        stderr=asyncio.subprocess.PIPE,
    )
    daemon = Process(process, f"127.0.0.1:{port}", f"http://127.0.0.1:{port + 1}/metrics")
    try:
        yield daemon
    finally:
        await daemon.channel.close()
        if process.returncode is None:
            process.kill()
        await process.communicate()


@pytest.fixture
def port() -> Iterator[int]:
    """A port that is free, and so is the next one; both are kept from all that take any port."""
    while True:
        with contextlib.ExitStack() as held:
            found = 0
            try:
                for number in range(2):
                    one = held.enter_context(socket.socket())
                    # Bound and not listening: a server that reuses addresses can listen there.
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # for relays
                    one.bind(("127.0.0.1", found + number if number else 0))
                    found = found or one.getsockname()[1]
            except (OSError, OverflowError):
                continue
            yield found
            return


async def test_sigterm_under_load_ends_every_stream_and_the_process(
    tmp_path: Path, port: int
) -> None:
    """Those that finish within the grace do, the others get DRAINING; nobody gets both."""
    async with daemon_process(tmp_path, port, "--drain-s", "5") as daemon:
        await daemon.serving()
        call = Call(daemon.stub.Generate())
        # All wait for more credit: none is at its end before the grace begins, and the long ones never are.
        for number in range(4):
            await call.start(f"short{number}", [40, 41], max_new_tokens=12, credit_tokens=10)
            await call.start(f"long{number}", [40, 41], max_new_tokens=500, credit_tokens=10)
        await call.read_until(lambda: call.num_tokens("long3") > 2)
        daemon.process.send_signal(signal.SIGTERM)
        await daemon.draining()
        for number in range(4):
            await call.let_go_on(f"short{number}")
        seen = await call.finish()
        for number in range(4):
            assert seen[f"short{number}"].reason == "LENGTH"
            assert reason_of(seen[f"long{number}"].error) == "DRAINING"
        assert await daemon.exit_status() == 0


async def test_idle_daemon_exits_at_once(tmp_path: Path, port: int) -> None:
    """It does not use up a grace that it does not need."""
    async with daemon_process(tmp_path, port, "--drain-s", "3600") as daemon:
        await daemon.serving()
        daemon.process.send_signal(signal.SIGINT)
        assert await daemon.exit_status() == 0


class _Stalling(ArtifactService):
    """A store that names its engines, and keeps who reads one waiting for ever."""

    def __init__(self, store: LocalStore) -> None:
        super().__init__(store)
        self.is_read = asyncio.Event()

    async def ReadBlob(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.is_read.set()
        await asyncio.Event().wait()
        yield


async def test_sigterm_ends_a_daemon_whose_pull_would_never_end(tmp_path: Path, port: int) -> None:
    store = LocalStore(tmp_path / "elsewhere")
    publish_echo(store)
    stalling = _Stalling(store)
    server = grpc.aio.server()
    artifact_pb2_grpc.add_ArtifactServiceServicer_to_server(stalling, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    flags = ("--store", f"grpc://{address}", "--cache", str(tmp_path / "cache"))
    try:
        async with daemon_process(tmp_path, port, *flags) as daemon:
            await stalling.is_read.wait()
            await daemon.stub.GetStatus(pb.GetStatusRequest(), wait_for_ready=True)
            daemon.process.send_signal(signal.SIGTERM)
            assert await daemon.exit_status() == 0
    finally:
        await server.stop(0)


async def test_engine_process_dies_with_a_killed_daemon(tmp_path: Path, port: int) -> None:
    async with daemon_process(tmp_path, port) as daemon:
        await daemon.serving()
        (engine,) = _children(daemon.process.pid)
        daemon.process.kill()
        await daemon.exit_status()
        await until(lambda: not _is_running(engine))


async def test_redis_knows_who_serves_and_its_loss_is_not_noticed(
    tmp_path: Path, port: int, embedded_redis: EmbeddedRedis
) -> None:
    flags = ("--redis-url", embedded_redis.url, "--heartbeat-s", "0.2")
    async with daemon_process(tmp_path, port, *flags) as daemon:
        await daemon.serving()
        status = await daemon.stub.GetStatus(pb.GetStatusRequest())
        key = f"runtime:{status.runtime_id}"
        client = connect_sync(embedded_redis.url)
        record: dict[str, str] = {}

        def is_serving() -> bool:
            nonlocal record
            # At once: a heartbeat that is late lets the record expire.
            record, left_ms = client.pipeline().hgetall(key).pttl(key).execute()
            assert left_ms <= 600
            return record.get("state") == "serving" and left_ms > 0

        await until(is_serving)
        assert record["address"] == f"127.0.0.1:{port}"
        assert (record["model"], record["arch"], record["quant"]) == ("echo", "cpu", "fp32")

        call = Call(daemon.stub.Generate())
        await call.start("a", [40, 41], max_new_tokens=100, credit_tokens=10)
        await call.read_until(lambda: call.num_tokens("a") > 2)
        await asyncio.to_thread(embedded_redis.kill)
        await call.let_go_on("a")
        assert (await call.finish())["a"].reason == "LENGTH"

        await asyncio.to_thread(embedded_redis.start)
        await until(lambda: bool(client.exists(key)))
        daemon.process.send_signal(signal.SIGTERM)
        assert await daemon.exit_status() == 0
        assert not client.exists(key)


async def test_startup_phases_begin_with_the_process_and_are_no_longer_than_it_took(
    tmp_path: Path, port: int
) -> None:
    before = time.monotonic()
    async with daemon_process(tmp_path, port) as daemon:
        await daemon.serving()
        took_s = time.monotonic() - before
        startup = (await daemon.stub.GetStatus(pb.GetStatusRequest())).startup
    names = [phase.name for phase in startup]
    assert names == [
        "start_daemon",
        "find_engine",
        "start_process",
        "import",
        "load_weights",
        "warm_up",
    ]
    spent = [phase.duration.ToNanoseconds() / 1e9 for phase in startup]
    assert spent[0] > 0, "a Python process was imported in no time"
    # The kernel counts a process's start in hundredths.
    assert sum(spent) <= took_s + 0.02


async def test_metrics_tell_what_happened(tmp_path: Path, port: int) -> None:
    async with daemon_process(tmp_path, port) as daemon:
        await daemon.serving()
        call = Call(daemon.stub.Generate())
        await call.start("a", [40] * 32, max_new_tokens=5)
        await call.start("b", [400])
        await call.finish()
        text = await asyncio.to_thread(lambda: urlopen(daemon.metrics).read().decode())
    for line in (
        "millrace_generated_tokens_total 5.0",
        "millrace_prompt_tokens_total 32.0",
        'millrace_generations_total{reason="finished"} 1.0',
        'millrace_generations_total{reason="INVALID_FIELD"} 1.0',
        "millrace_time_to_first_token_seconds_count 1.0",
        "millrace_inter_token_seconds_count 4.0",
        "millrace_kv_blocks 256.0",
    ):
        assert line in text


@pytest.mark.parametrize(
    ("flags", "message", "status"),
    [
        (["--model", "nothing"], "No engine 'nothing/cpu/fp32'", 1),
        (["--quant", "int4-gx"], "--quant 'int4-gx' is not of the form", 2),
        (["--arch", "sm_1"], "--arch 'sm_1' is not one of", 2),
        (["--model-uri", "x:y"], "--model-uri needs --compiler", 2),
        (["--drain-s", "-1"], "--drain-s", 2),
    ],
    ids=["no engine", "quant", "arch", "contradiction", "range"],
)
async def test_daemon_that_cannot_serve_says_why_and_exits(
    tmp_path: Path, port: int, flags: list[str], message: str, status: int
) -> None:
    LocalStore(tmp_path / "store")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "runtime_service", "--store", str(tmp_path / "store")),
        *("--listen", f"127.0.0.1:{port}", "--metrics-listen", ""),
        *("--model", "echo", "--arch", "cpu", "--quant", "fp32", *flags),
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]},
        stderr=asyncio.subprocess.PIPE,
    )
    _, stderr = await asyncio.wait_for(process.communicate(), HANG_S)
    assert message in stderr.decode().splitlines()[-1]
    assert process.returncode == status


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
async def test_waiting_engine_process_ends_with_a_daemon_that_loaded_nothing(
    tmp_path: Path, port: int, ending: signal.Signals
) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "runtime_service", "--store", str(tmp_path / "store")),
        *("--listen", f"127.0.0.1:{port}", "--metrics-listen", ""),
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]},
    )
    daemon = Process(process, f"127.0.0.1:{port}", "")
    try:
        status = await daemon.stub.GetStatus(pb.GetStatusRequest(), wait_for_ready=True)
        assert status.state == pb.RUNTIME_STATE_IDLE
        (engine,) = _children(process.pid)
        process.send_signal(ending)
        assert await daemon.exit_status() == (0 if ending == signal.SIGTERM else -ending)
        await until(lambda: not _is_running(engine))
    finally:
        await daemon.channel.close()
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_front_process_never_imports_torch() -> None:
    """A cached start is fast because torch is imported in the engine process alone."""
    code = "import sys, runtime_service.daemon; sys.exit('torch' in sys.modules)"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, cwd=ROOT)
    assert await process.wait() == 0


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def _is_running(pid: str) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


async def test_relays_pass_on_all_that_ends_with_the_daemon_and_end_with_it(
    tmp_path: Path, port: int
) -> None:
    """Streams on calls of their own, over two relays, while the daemon drains."""
    async with daemon_process(tmp_path, port, "--drain-s", "60", "--relays", "2") as daemon:
        await daemon.serving()
        children = psutil.Process(daemon.process.pid).children()
        relays = [child for child in children if "runtime_service.relay" in child.cmdline()]
        assert len(relays) == 2
        request = pb.GenerateStreamRequest(start=start_of([40, 41], max_new_tokens=60))
        streams = [daemon.stub.GenerateStream(request) for _ in range(8)]
        for stream in streams:
            await stream.read()
        daemon.process.send_signal(signal.SIGTERM)
        for stream in streams:
            events = await rest_of(stream)
            assert events[-1].finished.usage.generated_tokens == 60
        assert await daemon.exit_status() == 0
        assert not any(relay.is_running() for relay in relays)
