"""Engines are found, pulled, built and repaired before they are served."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from millrace.artifact.v1 import artifact_pb2_grpc
from millrace.compiler.v1 import compiler_pb2 as pb
from millrace.compiler.v1 import compiler_pb2_grpc
from prometheus_client import CollectorRegistry

from compiler_service.artifact_service import ArtifactService
from runtime_service.device import arch_of
from runtime_service.engine_source import EngineSource
from shared.engine import FORMAT_VERSION, EngineManifest, EngineSelector
from shared.errors import (
    ArchMismatch,
    BuildNotFound,
    BuildQueueFull,
    CompilerUnreachable,
    DigestMismatch,
    EngineNotFound,
    FormatMismatch,
    InvalidModel,
    MillraceError,
    to_status,
)
from shared.server import DaemonServer
from shared.store import LocalStore
from shared.store.cache import EngineCache
from shared.store.remote import GrpcStore
from tests.runtime_service.daemon import FP32, publish_echo, running_daemon, until

ECHO = EngineSelector("echo", "cpu", FP32)


class Builder(compiler_pb2_grpc.CompilerServiceServicer):
    """Builds the echo engine into its store when asked, as a compile daemon would.

    Args:
        refuses: raised by BuildEngine.
        fails: what the build ends with instead.
        drops: watches that lose their connection before they tell the end.
        hangs: watches that say nothing more before they tell the end, as of a machine that vanished.
        forgets: watches of an operation that is not known any more.
    """

    def __init__(
        self,
        store: LocalStore,
        refuses: MillraceError | None = None,
        fails: MillraceError | None = None,
        drops: int = 0,
        hangs: int = 0,
        forgets: int = 0,
    ) -> None:
        self.requests: list[pb.BuildEngineRequest] = []
        self._store = store
        self._refuses = refuses
        self._fails = fails
        self._drops, self._hangs, self._forgets = drops, hangs, forgets

    async def BuildEngine(self, request: pb.BuildEngineRequest, context: Any) -> Any:
        self.requests.append(request)
        if self._refuses is not None:
            raise self._refuses
        operation = pb.Operation(name="operations/x", state=pb.OPERATION_STATE_RESOLVING)
        return pb.BuildEngineResponse(operation=operation)

    async def WatchOperation(self, request: pb.WatchOperationRequest, context: Any) -> Any:
        assert request.name == "operations/x"
        if self._forgets:
            self._forgets -= 1
            raise BuildNotFound(build=request.name, kept="7 days")
        operation = pb.Operation(name=request.name, state=pb.OPERATION_STATE_RESOLVED)
        build = operation.builds.add(state=pb.BUILD_STATE_RUNNING)
        build.progress.stage = "quantize"
        yield pb.WatchOperationResponse(operation=operation)
        if self._drops:
            self._drops -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the connection is gone")
        if self._hangs:
            self._hangs -= 1
            await asyncio.Event().wait()
        if self._fails is not None:
            build.state = pb.BUILD_STATE_FAILED
            build.error.CopyFrom(to_status(self._fails))
        else:
            publish_echo(self._store)
            build.state = pb.BUILD_STATE_SUCCEEDED
        yield pb.WatchOperationResponse(operation=operation)


@asynccontextmanager
async def compile_daemon(builder: Builder, store: LocalStore) -> AsyncIterator[str]:
    """The address of a server with `builder` and the artifacts of `store`."""
    server = DaemonServer("127.0.0.1:0", 4 << 20, CollectorRegistry())
    artifact_pb2_grpc.add_ArtifactServiceServicer_to_server(ArtifactService(store), server.grpc)
    compiler_pb2_grpc.add_CompilerServiceServicer_to_server(builder, server.grpc)
    await server.start("millrace.compiler.v1.CompilerService")
    try:
        yield server.address
    finally:
        await server.grpc.stop(0)


def not_called() -> None:
    raise AssertionError("a build was announced")


async def test_local_engine_is_found_without_a_compile_daemon(tmp_path: Path) -> None:
    local = LocalStore(tmp_path)
    published = publish_echo(local)
    source = EngineSource(local, GrpcStore("127.0.0.1:1"), "127.0.0.1:1")
    assert (await source.find(ECHO, "some:uri", not_called)).name == published.name


async def test_remote_engine_is_pulled(tmp_path: Path) -> None:
    local, remote = LocalStore(tmp_path / "local"), LocalStore(tmp_path / "remote")
    published = publish_echo(remote)
    async with compile_daemon(Builder(remote), remote) as address:
        source = EngineSource(local, GrpcStore(address), address)
        found = await source.find(ECHO, "", not_called)
    assert found.name == published.name
    local.verify(found)


async def test_newer_engine_of_a_store_elsewhere_takes_the_place_of_the_one_in_the_cache(
    tmp_path: Path,
) -> None:
    """Also where one is served: a new version of a deployment in which nothing else changed asks for it."""
    remote = LocalStore(tmp_path / "remote")
    async with running_daemon(tmp_path / "runtime") as daemon:
        runtime, cache = daemon.runtime, EngineCache(daemon.store, 0)
        runtime.keeper._starter._source = EngineSource(daemon.store, remote, "", cache=cache)
        served = await runtime.load(ECHO, "", anew=False)
        assert served.key.builder == "test", "the other store has none"
        newer = publish_echo(remote, builder="newer")
        pid = daemon.client.pid
        assert await runtime.load(ECHO, "", anew=False) == newer
        assert daemon.client.pid != pid
        pid = daemon.client.pid
        assert await runtime.load(ECHO, "", anew=False) == newer
        assert daemon.client.pid == pid
        # Which of a cache's engines is the newest is for the other store to say.
        publish_echo(daemon.store, builder="of nobody else")
        assert await runtime.load(ECHO, "", anew=False) == newer


async def test_cached_engine_will_do_where_its_store_is_away_but_not_for_a_newer_one(
    tmp_path: Path,
) -> None:
    local = LocalStore(tmp_path)
    cached = publish_echo(local)
    away = EngineSource(local, GrpcStore("127.0.0.1:1"), "", cache=EngineCache(local, 0))
    with structlog.testing.capture_logs() as logs:
        assert await away.find(ECHO, "", not_called) == cached
    assert [log["instead"] for log in logs if log["event"] == "newest_engine_not_had"] == [
        cached.name
    ]
    with pytest.raises(CompilerUnreachable):
        await away.find(ECHO, "", not_called, may_be_older=False)


@pytest.mark.parametrize("drops", [0, 1])
async def test_missing_engine_is_built_and_pulled(tmp_path: Path, drops: int) -> None:
    """Also where the connection is lost while the build runs."""
    local, remote = LocalStore(tmp_path / "local"), LocalStore(tmp_path / "remote")
    builder = Builder(remote, drops=drops)
    announced = asyncio.Event()
    async with compile_daemon(builder, remote) as address:
        source = EngineSource(local, GrpcStore(address), address)
        found = await source.find(ECHO, "sample:echo", announced.set)
    local.verify(found)
    assert announced.is_set()
    assert [(r.model_uri, list(r.archs), r.quant.scheme, r.model) for r in builder.requests] == [
        ("sample:echo", ["cpu"], "fp32", "echo")
    ]


async def test_build_is_watched_anew_where_nothing_is_heard_for_long(tmp_path: Path) -> None:
    """A compile daemon's machine that lost its power closes no connection."""
    local = LocalStore(tmp_path)
    builder = Builder(local, hangs=2)
    async with compile_daemon(builder, local) as address:
        source = EngineSource(local, None, address, watch_s=0.3)
        async with asyncio.timeout(30.0):
            found = await source.find(ECHO, "sample:echo", lambda: None)
    assert (found.model, len(builder.requests)) == ("echo", 1)


async def test_build_that_is_forgotten_is_asked_for_again(tmp_path: Path) -> None:
    """Redis came back empty: who still wants the engine says so, and no runtime ends."""
    local = LocalStore(tmp_path)
    builder = Builder(local, forgets=2)
    async with compile_daemon(builder, local) as address:
        found = await EngineSource(local, None, address).find(ECHO, "sample:echo", lambda: None)
    assert (found.model, len(builder.requests)) == ("echo", 3)


async def test_build_into_a_shared_store_needs_no_pull(tmp_path: Path) -> None:
    local = LocalStore(tmp_path)
    async with compile_daemon(Builder(local), local) as address:
        found = await EngineSource(local, None, address).find(ECHO, "sample:echo", lambda: None)
    assert found.model == "echo"


async def test_missing_engine_without_uri_is_not_built(tmp_path: Path) -> None:
    remote = LocalStore(tmp_path / "remote")
    builder = Builder(remote)
    async with compile_daemon(builder, remote) as address:
        source = EngineSource(LocalStore(tmp_path / "local"), GrpcStore(address), address)
        with pytest.raises(EngineNotFound, match="echo/cpu/fp32"):
            await source.find(ECHO, "", not_called)
    assert not builder.requests


@pytest.mark.parametrize(
    ("builder", "error"),
    [
        ({"fails": InvalidModel(problem="a shard is missing")}, InvalidModel),
        ({"refuses": BuildQueueFull(queued=9, max_queued=9)}, BuildQueueFull),
    ],
    ids=["build fails", "build is refused"],
)
async def test_failed_build_says_why(
    tmp_path: Path, builder: dict[str, Any], error: type[MillraceError]
) -> None:
    remote = LocalStore(tmp_path / "remote")
    async with compile_daemon(Builder(remote, **builder), remote) as address:
        source = EngineSource(LocalStore(tmp_path / "local"), GrpcStore(address), address)
        with pytest.raises(error):
            await source.find(ECHO, "sample:echo", lambda: None)


async def test_absent_compile_daemon_is_named(tmp_path: Path) -> None:
    source = EngineSource(LocalStore(tmp_path), None, "127.0.0.1:1")
    with pytest.raises(CompilerUnreachable, match=r"127\.0\.0\.1:1"):
        await source.find(ECHO, "sample:echo", lambda: None)


async def test_engine_of_an_unknown_format_is_refused(tmp_path: Path) -> None:
    local = LocalStore(tmp_path)
    publish_echo(local, format_version=FORMAT_VERSION + 1)
    with pytest.raises(FormatMismatch):
        await EngineSource(local, None, "").find(ECHO, "", not_called)


def corrupt(store: LocalStore, engine: EngineManifest) -> Path:
    """Damages one blob of `engine`; its path."""
    path = store.blob_path(engine.layer("name.txt").digest)
    path.write_bytes(b"x" * path.stat().st_size)
    return path


async def test_corrupt_engine_is_refused_when_there_is_no_other_copy(tmp_path: Path) -> None:
    async with running_daemon(tmp_path) as daemon:
        corrupt(daemon.store, publish_echo(daemon.store, "second"))
        with pytest.raises(DigestMismatch):
            await daemon.load("second")
        # The corrupt copy was set aside: the store has the engine no more.
        with pytest.raises(EngineNotFound):
            await daemon.load("second")
        assert daemon.runtime.served is not None
        assert daemon.runtime.served.engine.model == "echo"


async def test_corrupt_engine_is_fetched_again(tmp_path: Path) -> None:
    async with running_daemon(tmp_path) as daemon:
        remote = LocalStore(tmp_path / "remote")
        publish_echo(remote, "second")
        path = corrupt(daemon.store, publish_echo(daemon.store, "second"))
        daemon.runtime.keeper._starter._source = EngineSource(daemon.store, remote, "")
        await daemon.load("second")
        assert daemon.runtime.served is not None
        assert daemon.runtime.served.engine.model == "second"
        assert path.read_bytes() == b"second"


async def test_corrupt_engine_is_built_again_when_the_store_is_the_only_one(
    tmp_path: Path,
) -> None:
    """A lost engine too: the compile daemon, on the same store, has no other copy to give."""
    async with running_daemon(tmp_path) as daemon:
        builder = Builder(daemon.store)
        async with compile_daemon(builder, daemon.store) as address:
            runtime = daemon.runtime
            runtime.keeper._starter._source = EngineSource(
                daemon.store, GrpcStore(address), address
            )
            engine = await runtime.load(ECHO, "sample:echo")
            assert not builder.requests
            path = corrupt(daemon.store, engine)
            os.kill(daemon.client.pid, signal.SIGKILL)
            await until(lambda: runtime.served is None)
            await until(lambda: runtime.served is not None)
            assert path.read_bytes() == b"echo"
            corrupt(daemon.store, engine)
            await runtime.load(ECHO, "sample:echo")
        assert [request.model_uri for request in builder.requests] == ["sample:echo"] * 2


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        ((9, 0), "sm_90"),
        ((8, 0), "sm_80"),
        ((8, 7), "sm_86"),
        ((8, 9), "sm_89"),
        ((12, 0), "sm_120"),
        ((10, 3), "sm_89"),
        ((12, 1), "sm_89"),
    ],
)
def test_arch_follows_from_the_capability(capability: tuple[int, int], arch: str) -> None:
    assert arch_of(capability).name == arch


def test_unknown_device_is_refused() -> None:
    with pytest.raises(ArchMismatch, match="sm_75"):
        arch_of((7, 5))
