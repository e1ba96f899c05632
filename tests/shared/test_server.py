"""The edge turns errors into statuses with details, leaks nothing, and the server drains."""

import asyncio
import os
import signal
import urllib.request
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from millrace.compiler.v1 import compiler_pb2, compiler_pb2_grpc
from prometheus_client import CollectorRegistry

from shared.errors import BuildQueueFull, InvalidField, reason_of
from shared.server import DaemonServer, daemon_registry, start_metrics
from shared.settings import SettingsError

SERVICE = "millrace.compiler.v1.CompilerService"


class ExampleServicer(compiler_pb2_grpc.CompilerServiceServicer):
    """Answers by the name that it is asked for."""

    def __init__(self) -> None:
        self.is_watched = asyncio.Event()
        self.release = asyncio.Event()

    async def GetBuild(self, request: compiler_pb2.GetBuildRequest, context: Any) -> Any:
        match request.name:
            case "full":
                raise BuildQueueFull(queued=9, max_queued=8)
            case "invalid":
                raise InvalidField(field="name", problem="is invalid")
            case "bug":
                raise KeyError("a secret")
            case "abort":
                await context.abort(grpc.StatusCode.DATA_LOSS, "its own words")
        return compiler_pb2.GetBuildResponse(build=compiler_pb2.Build(name=request.name))

    async def WatchBuild(
        self, request: compiler_pb2.WatchBuildRequest, context: Any
    ) -> AsyncIterator[compiler_pb2.WatchBuildResponse]:
        yield compiler_pb2.WatchBuildResponse(build=compiler_pb2.Build(name="first"))
        self.is_watched.set()
        if request.name == "full":
            raise BuildQueueFull(queued=9, max_queued=8)
        await self.release.wait()
        yield compiler_pb2.WatchBuildResponse(build=compiler_pb2.Build(name="last"))


class Daemon:
    """A started server, its servicer and a client."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.server = DaemonServer("127.0.0.1:0", 1 << 16, self.registry)
        self.servicer = ExampleServicer()  # type: ignore[abstract]
        compiler_pb2_grpc.add_CompilerServiceServicer_to_server(self.servicer, self.server.grpc)

    async def start(self) -> None:
        await self.server.start(SERVICE)
        self.channel = grpc.aio.insecure_channel(self.server.address)
        self.client = compiler_pb2_grpc.CompilerServiceStub(self.channel)

    def get(self, name: str) -> Any:
        return self.client.GetBuild(compiler_pb2.GetBuildRequest(name=name), timeout=60)

    def sample(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)


@pytest.fixture
async def daemon() -> AsyncIterator[Daemon]:
    started = Daemon()
    await started.start()
    yield started
    await started.channel.close()
    await started.server.grpc.stop(0)


def status_of(error: grpc.aio.AioRpcError) -> Any:
    return rpc_status.from_call(error)


async def test_error_crosses_with_reason_and_retry(daemon: Daemon) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await daemon.get("full")
    assert failed.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert failed.value.details() == "9 builds are waiting and at most 8 may; try again in 30 s."
    status = status_of(failed.value)
    assert reason_of(status) == "BUILD_QUEUE_FULL"
    assert any(detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for detail in status.details)
    await daemon.server.edge.wait_idle()  # the client hears of it before it is counted
    assert daemon.sample("millrace_rpcs_total", rpc="GetBuild", code="RESOURCE_EXHAUSTED") == 1


async def test_invalid_field_carries_its_violation(daemon: Daemon) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await daemon.get("invalid")
    violations = error_details_pb2.BadRequest()
    for detail in status_of(failed.value).details:
        if detail.Is(violations.DESCRIPTOR):
            detail.Unpack(violations)
    assert [v.field for v in violations.field_violations] == ["name"]


async def test_unforeseen_error_is_internal_and_leaks_nothing(daemon: Daemon) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await daemon.get("bug")
    assert failed.value.code() == grpc.StatusCode.INTERNAL
    assert "secret" not in str(failed.value)
    assert reason_of(status_of(failed.value)) == "INTERNAL"
    assert (await daemon.get("fine")).build.name == "fine"


async def test_error_ends_a_stream_after_what_it_gave(daemon: Daemon) -> None:
    watch: Any = daemon.client.WatchBuild(compiler_pb2.WatchBuildRequest(name="full"), timeout=60)
    assert (await watch.read()).build.name == "first"
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await watch.read()
    assert reason_of(status_of(failed.value)) == "BUILD_QUEUE_FULL"


async def test_unknown_field_is_refused_at_any_depth(daemon: Daemon) -> None:
    request = compiler_pb2.BuildEngineRequest()
    request.quant.MergeFromString(b"\x9a\x06\x01x")  # field 99, a string
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await daemon.client.BuildEngine(request, timeout=60)
    assert reason_of(status_of(failed.value)) == "INVALID_FIELD"
    assert "QuantConfig#99" in str(failed.value.details())


async def test_oversized_message_is_refused_and_the_daemon_goes_on(daemon: Daemon) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await daemon.get("x" * (1 << 17))
    assert failed.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await daemon.get("fine")).build.name == "fine"


async def test_vanished_client_ends_its_call(daemon: Daemon) -> None:
    call = daemon.client.WatchBuild(compiler_pb2.WatchBuildRequest(name="x"))
    await daemon.servicer.is_watched.wait()
    assert daemon.sample("millrace_rpcs_running", rpc="WatchBuild") == 1
    call.cancel()
    await asyncio.wait_for(daemon.server.edge.wait_idle(), 60)
    assert daemon.sample("millrace_rpcs_total", rpc="WatchBuild", code="CANCELLED") == 1


async def test_reflection_lists_the_services(daemon: Daemon) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(daemon.channel)
    asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    names = [s.name async for r in stub.ServerReflectionInfo(asked)
             for s in r.list_services_response.service]  # fmt: skip
    assert SERVICE in names
    assert "grpc.health.v1.Health" in names


async def test_taken_port_is_named(daemon: Daemon) -> None:
    second = DaemonServer(daemon.server.address, 1 << 16, CollectorRegistry())
    with pytest.raises(
        SettingsError, match=f"cannot listen on {daemon.server.address}: another process does"
    ) as taken:
        await second.start(SERVICE)
    assert "GRPC_VERBOSITY" not in str(taken.value)


async def test_sigterm_drains_running_calls_and_refuses_new_ones(daemon: Daemon) -> None:
    drained = asyncio.Event()

    async def drain() -> None:
        drained.set()

    health = health_pb2_grpc.HealthStub(daemon.channel)
    serving = asyncio.create_task(daemon.server.serve_until_signal(drain, 30))
    watch: Any = daemon.client.WatchBuild(compiler_pb2.WatchBuildRequest(name="x"), timeout=60)
    assert (await watch.read()).build.name == "first"
    os.kill(os.getpid(), signal.SIGTERM)
    await drained.wait()
    state = await health.Check(health_pb2.HealthCheckRequest(service=SERVICE))
    assert state.status == health_pb2.HealthCheckResponse.NOT_SERVING
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await daemon.get("fine")
    assert reason_of(status_of(refused.value)) == "DRAINING"
    assert not serving.done()
    daemon.servicer.release.set()
    assert (await watch.read()).build.name == "last"
    assert await watch.read() is grpc.aio.EOF
    await asyncio.wait_for(serving, 60)


async def test_second_signal_stops_at_once(daemon: Daemon) -> None:
    draining = asyncio.Event()

    async def never_ends() -> None:
        draining.set()
        await asyncio.Event().wait()

    serving = asyncio.create_task(daemon.server.serve_until_signal(never_ends, 300))
    await asyncio.sleep(0)
    os.kill(os.getpid(), signal.SIGTERM)
    await draining.wait()
    os.kill(os.getpid(), signal.SIGINT)
    await asyncio.wait_for(serving, 60)


async def test_metrics_are_served_over_http() -> None:
    address = start_metrics("127.0.0.1:0", daemon_registry())

    def read() -> str:
        with urllib.request.urlopen(f"http://{address}/metrics") as response:
            return str(response.read().decode())

    assert "process_resident_memory_bytes" in await asyncio.to_thread(read)
