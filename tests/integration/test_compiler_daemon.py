"""Real compile daemons, real builds, a real Valkey: one key is one engine, whatever happens."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import millrace
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from millrace.compiler.v1 import compiler_pb2

from shared.errors import reason_of
from shared.redis import EmbeddedRedis
from shared.store import LocalStore
from tests.checkpoints import write_checkpoint
from tests.integration.compiler_daemon import Client, CompilerDaemon, client_of, refusal
from tests.runtime_service.daemon import until

pytestmark = pytest.mark.redis

SUCCEEDED, CANCELLED = compiler_pb2.BUILD_STATE_SUCCEEDED, compiler_pb2.BUILD_STATE_CANCELLED
RUNNING, QUEUED = compiler_pb2.BUILD_STATE_RUNNING, compiler_pb2.BUILD_STATE_QUEUED

Start = Callable[..., CompilerDaemon]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def start(redis_url: str, tmp_path: Path) -> Iterator[Start]:
    """Starts daemons that share a Redis and a store, and ends them after the test."""
    daemons: list[CompilerDaemon] = []

    def start_daemon(*flags: str, **options: float) -> CompilerDaemon:
        daemons.append(CompilerDaemon(redis_url, tmp_path, *flags, **options))
        return daemons[-1]

    yield start_daemon
    for daemon in daemons:
        daemon.close()


async def build_in(client: Client, operation: Any, state: Any) -> Any:
    """The operation's first build once it is in that state."""
    request = compiler_pb2.WatchOperationRequest(name=operation.name)
    async for response in client.stub.WatchOperation(request, timeout=120):
        for build in response.operation.builds:
            if build.state == state:
                return build
    raise AssertionError("the operation ended before")


def children_of(pid: int) -> list[int]:
    """Process ids of the build children of a daemon."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


async def stopped_child(daemon: CompilerDaemon) -> int:
    """Stops the daemon's build child at its beginning, so that the build is not over before a test goes on.

    It ends with its daemon; SIGCONT lets it go on.
    """

    def has_begun() -> bool:
        """Claims that it is a program of its own, which knows what to do at SIGTERM and when its daemon dies."""
        found = children_of(daemon.process.pid)
        return (
            bool(found)
            and "build_child" in Path(f"/proc/{found[0]}/cmdline").read_text()
            and has_signal(found[0], "SigCgt", signal.SIGTERM)
        )

    await until(has_begun)
    (child,) = children_of(daemon.process.pid)
    os.kill(child, signal.SIGSTOP)
    return child


def has_signal(pid: int, field: str, number: signal.Signals) -> bool:
    """Claims that a set of signals of a process holds that one. Source: proc(5), status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (mask,) = (int(line.split()[1], 16) for line in lines if line.startswith(f"{field}:"))
    return bool(mask >> (number - 1) & 1)


async def continued_to_its_end(child: int) -> None:
    """Has a stopped child go on once its daemon has told it to end."""
    await until(lambda: has_signal(child, "ShdPnd", signal.SIGTERM))
    os.kill(child, signal.SIGCONT)


def metrics_of(daemon: CompilerDaemon) -> str:
    """What Prometheus would read."""
    with urllib.request.urlopen(f"http://{daemon.metrics_address}/metrics") as response:
        return str(response.read().decode())


async def lines_of(daemon: CompilerDaemon) -> list[dict[str, Any]]:
    """All that a daemon has logged, once it has ended: callers may hear of a build before its line is written."""
    daemon.send(signal.SIGTERM)
    await asyncio.to_thread(daemon.process.wait, 60)
    daemon.close()
    return daemon.lines


async def test_two_daemons_and_many_callers_make_one_engine_and_the_next_call_is_cached(
    start: Start, model: Path, tmp_path: Path
) -> None:
    first, second = start(), start()
    async with client_of(first) as a, client_of(second) as b:
        ended = await asyncio.gather(*(c.built(model, "cpu") for c in (a, b) * 5))
        assert {operation.builds[0].state for operation in ended} == {SUCCEEDED}
        assert len({operation.builds[0].name for operation in ended}) == 1
        again = await b.built(model, "cpu")
        assert again.builds[0].cached
        # A moved folder is the same model.
        moved = write_checkpoint(tmp_path / "elsewhere")
        assert (await a.built(moved, "cpu")).builds[0].name == again.builds[0].name
    lines = [line for daemon in (first, second) for line in await lines_of(daemon)]
    assert sum(line.get("event") == "build_attempt_ended" for line in lines) == 1
    engines = LocalStore(tmp_path / "store").list()
    assert [engine.key.digest for engine in engines] == [again.builds[0].name.split("/")[1]]


async def test_killed_daemon_is_replaced_by_another(start: Start, model: Path) -> None:
    doomed, survivor = start(), start("--no-worker")
    async with client_of(survivor) as client:
        operation = await client.ask(model, "cpu")
        await stopped_child(doomed)
        await build_in(client, operation, RUNNING)
        doomed.send(signal.SIGKILL)
        start(lease_s=1.5)
        ended = await client.end_of(operation)
    assert (ended.builds[0].state, ended.builds[0].attempt) == (SUCCEEDED, 2)


async def test_daemon_stopped_past_its_lease_does_no_harm_when_it_goes_on(
    start: Start, model: Path, tmp_path: Path
) -> None:
    stopped, watching = start(), start("--no-worker")
    async with client_of(watching) as client:
        operation = await client.ask(model, "cpu")
        child = await stopped_child(stopped)
        await build_in(client, operation, RUNNING)
        stopped.send(signal.SIGSTOP)
        start(lease_s=1.5)
        ended = await client.end_of(operation)
        assert (ended.builds[0].state, ended.builds[0].attempt) == (SUCCEEDED, 2)
        stopped.send(signal.SIGCONT)
        os.kill(child, signal.SIGCONT)
        line = await asyncio.to_thread(stopped.wait_for, "build_attempt_ended")
        assert line["outcome"] == "fenced"
        after = await client.stub.GetBuild(
            compiler_pb2.GetBuildRequest(name=ended.builds[0].name), timeout=60
        )
        assert after.build == ended.builds[0]
    store = LocalStore(tmp_path / "store")
    assert len(store.list()) == 1
    store.verify(store.list()[0])


async def test_build_resumes_when_redis_was_stopped_and_started(
    start: Start, model: Path, embedded_redis: EmbeddedRedis
) -> None:
    daemon = start()
    async with client_of(daemon) as client:
        operation = await client.ask(model, "cpu")
        child = await stopped_child(daemon)
        await build_in(client, operation, RUNNING)
        embedded_redis.stop()
        request = compiler_pb2.WatchOperationRequest(name=operation.name)
        code, reason, _ = await refusal(client.stub.WatchOperation(request, timeout=60).read())
        assert (code, reason) == (grpc.StatusCode.UNAVAILABLE, "REDIS_UNREACHABLE")
        os.kill(child, signal.SIGCONT)
        embedded_redis.start()
        ended = await client.end_of(operation)
    assert (ended.builds[0].state, ended.builds[0].attempt) == (SUCCEEDED, 1)


@pytest.mark.parametrize("is_over", [False, True], ids=["goes on", "is over"])
async def test_build_ends_once_and_is_found_when_redis_came_back_empty(
    start: Start, model: Path, embedded_redis: EmbeddedRedis, tmp_path: Path, is_over: bool
) -> None:
    """Whether it ends after Redis is back or before: the SDK's caller sees its end, and the engine."""
    daemon, store = start(), LocalStore(tmp_path / "store")
    retries = millrace.Retries(max_attempts=1000)
    async with (
        client_of(daemon) as client,
        millrace.AsyncClient(compiler=daemon.address, retries=retries) as sdk,
    ):
        building = asyncio.create_task(sdk.build(str(model), ["cpu"], "int8"))
        child = await stopped_child(daemon)
        embedded_redis.stop()
        shutil.rmtree(tmp_path / "redis-data" / "appendonlydir")
        os.kill(child, signal.SIGCONT)
        if is_over:
            await until(lambda: bool(store.list()))
        embedded_redis.start()
        (ended,) = (await building).builds
        assert ended.state == SUCCEEDED
        (engine,) = store.list()
        assert (await sdk.get_engine(engine.name)).engine.key == ended.key
        (listed,) = (await client.stub.ListBuilds(compiler_pb2.ListBuildsRequest())).builds
        assert (listed.name, listed.state) == (f"builds/{engine.key.digest}", SUCCEEDED)


async def test_cancel_ends_the_child_leaves_no_engine_and_is_counted(
    start: Start, model: Path, tmp_path: Path
) -> None:
    daemon = start()
    async with client_of(daemon) as client:
        operation = await client.ask(model, "cpu")
        child = await stopped_child(daemon)
        build = await build_in(client, operation, RUNNING)
        await client.stub.CancelBuild(compiler_pb2.CancelBuildRequest(name=build.name), timeout=60)
        await continued_to_its_end(child)
        ended = await client.end_of(operation)
        assert ended.builds[0].state == CANCELLED
        assert children_of(daemon.process.pid) == []
        assert LocalStore(tmp_path / "store").list() == ()
        again = await client.built(model, "cpu")
    assert again.builds[0].state == SUCCEEDED
    # It is counted then: callers may hear of its end before.
    await asyncio.to_thread(daemon.wait_for, "build_attempt_ended", outcome="SUCCEEDED")
    metrics = await asyncio.to_thread(metrics_of, daemon)
    assert 'millrace_builds_ended_total{arch="cpu",outcome="CANCELLED"} 1.0' in metrics
    assert 'millrace_builds_ended_total{arch="cpu",outcome="SUCCEEDED"} 1.0' in metrics
    assert 'millrace_build_duration_seconds_count{arch="cpu"} 1.0' in metrics


async def test_sigterm_returns_the_build_uncounted_and_tells_the_watchers(
    start: Start, model: Path
) -> None:
    leaving, staying = start(), start("--no-worker")
    async with client_of(leaving) as client, client_of(staying) as other:
        operation = await client.ask(model, "cpu")
        child = await stopped_child(leaving)
        await build_in(client, operation, RUNNING)
        health = health_pb2_grpc.HealthStub(client.channel)
        state = await health.Check(health_pb2.HealthCheckRequest())
        assert state.status == health_pb2.HealthCheckResponse.SERVING
        watching = asyncio.create_task(client.end_of(operation))
        await build_in(client, operation, RUNNING)
        leaving.send(signal.SIGTERM)
        await continued_to_its_end(child)
        assert (await refusal(watching))[1] == "DRAINING"
        assert await asyncio.to_thread(leaving.process.wait, 60) == 0
        start()
        ended = await other.end_of(operation)
    assert (ended.builds[0].state, ended.builds[0].attempt) == (SUCCEEDED, 1)


async def test_broken_checkpoint_is_refused_and_leaves_no_engine(
    start: Start, tmp_path: Path
) -> None:
    broken = write_checkpoint(tmp_path / "broken")
    shard = broken / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    async with client_of(start()) as client:
        reason, sentence = await why_not(client, broken)
    assert reason == "INVALID_MODEL"
    assert "\n" not in sentence
    assert LocalStore(tmp_path / "store").list() == ()


async def why_not(client: Client, model: Path) -> tuple[str, str]:
    """Why the model cannot be built: from the call, or from the operation if that was quicker."""
    try:
        operation = await client.built(model, "cpu")
    except grpc.aio.AioRpcError as error:
        status = rpc_status.from_call(error)
    else:
        status = operation.error
    return reason_of(status), status.message


async def test_full_disk_fails_the_build_with_disk_full(tmp_path: Path, redis_url: str) -> None:
    """A limit on file sizes stands in for the disk: the kernel refuses writes as it would there."""
    model = write_checkpoint(tmp_path / "model", hidden_size=256, vocab_size=4096)
    daemon = CompilerDaemon(redis_url, tmp_path, file_limit_bytes=1 << 20)
    try:
        async with client_of(daemon) as client:
            ended = await client.built(model, "cpu")
    finally:
        daemon.close()
    assert ended.builds[0].state == compiler_pb2.BUILD_STATE_FAILED
    assert reason_of(ended.builds[0].error) == "DISK_FULL"
    assert LocalStore(tmp_path / "store").list() == ()


async def test_daemon_without_redis_url_brings_its_own_and_keeps_it_running(
    tmp_path: Path, model: Path
) -> None:
    daemon = CompilerDaemon("", tmp_path)
    try:
        async with client_of(daemon) as client:
            await client.built(model, "cpu")
            children = psutil.Process(daemon.process.pid).children()
            (own,) = (child for child in children if "valkey" in child.name())
            own.kill()
            await asyncio.to_thread(daemon.wait_for, "embedded_redis_ended")
            await asyncio.to_thread(daemon.wait_for, "embedded_redis_started")
            listed = await client.stub.ListBuilds(compiler_pb2.ListBuildsRequest(), timeout=60)
            # What it knew is there.
            assert len(listed.builds) == 1
        daemon.send(signal.SIGTERM)
        assert await asyncio.to_thread(daemon.process.wait, 60) == 0
    finally:
        daemon.close()


@pytest.mark.parametrize(
    ("arguments", "environ", "message"),
    [
        (["--lease-s", "0"], {}, "--lease-s (MILLRACE_COMPILER_LEASE_S)"),
        ([], {"MILLRACE_COMPILER_LEESE_S": "1"}, "unknown setting MILLRACE_COMPILER_LEESE_S"),
        (["--listen", "7601"], {}, "MILLRACE_COMPILER_LISTEN): it is of the form host:port"),
        (["--redis-url", "h:6379"], {}, "--redis-url (MILLRACE_REDIS_URL): it is of the form"),
        (["--store", "grpc://h:1"], {}, "--store (MILLRACE_STORE)"),
    ],
)
def test_wrong_setting_ends_the_daemon_with_one_line(
    arguments: list[str], environ: dict[str, str], message: str, tmp_path: Path
) -> None:
    flags = ["--state-dir", str(tmp_path / "redis"), "--cache-dir", str(tmp_path / "cache")]
    store = [] if "--store" in arguments else ["--store", str(tmp_path / "store")]
    ended = subprocess.run(
        [sys.executable, "-m", "compiler_service", "--metrics-listen", "", *flags, *store,
         *arguments],
        capture_output=True, text=True, timeout=60, env={**os.environ, **environ},
    )  # fmt: skip
    assert ended.returncode == 2
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("millrace-compiler: ")
    assert message in last


def test_daemon_whose_port_is_taken_says_so_in_one_line(
    start: Start, redis_url: str, tmp_path: Path
) -> None:
    first = start()
    flags = ("--listen", first.address, "--metrics-listen", "", "--redis-url", redis_url)
    second = subprocess.run(
        [sys.executable, "-m", "compiler_service", *flags, "--store", str(tmp_path / "other"),
         "--cache-dir", str(tmp_path / "cache")],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert second.returncode == 2
    (line,) = second.stderr.splitlines()
    assert line.startswith(f"millrace-compiler: cannot listen on {first.address}: ")
