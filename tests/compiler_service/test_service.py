"""CompilerService over the wire, with a real store and a real Valkey and no worker."""

import dataclasses
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from millrace.compiler.v1 import compiler_pb2, compiler_pb2_grpc
from millrace.engine.v1 import engine_pb2
from prometheus_client import CollectorRegistry

# It imports torch, for seconds: a first request would be answered before it is resolved.
import compiler_service.resolve  # noqa: F401
from compiler_service.build_queue import BuildQueue
from compiler_service.build_record import SUCCEEDED
from compiler_service.compiler import Compiler
from compiler_service.metrics import CompilerMetrics
from compiler_service.operations import (
    RESOLVED,
    RESOLVING,
    RESOLVING_KEPT_S,
    OperationRecord,
    Operations,
    events_key,
)
from compiler_service.progress import BuildProgress
from compiler_service.service import CompilerService
from shared.engine import FILE_TYPE, EngineDraft, EngineKey, EngineManifest, QuantConfig
from shared.errors import reason_of
from shared.redis import EmbeddedRedis, connect
from shared.server import DaemonServer
from shared.store import LocalStore
from tests.checkpoints import write_checkpoint
from tests.compiler_service.build_helpers import job
from tests.integration.compiler_daemon import Client, refusal

pytestmark = pytest.mark.redis

INVALID, NOT_FOUND = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND


@dataclass
class Daemon:
    """A serving compile daemon without a worker, and its parts."""

    client: Client
    service: CompilerService
    queue: BuildQueue
    store: LocalStore

    @property
    def stub(self) -> Any:
        return self.client.stub

    def publish(self, text: str) -> EngineManifest:
        """A small engine in the store."""
        blob = self.store.write_blob([text.encode()], FILE_TYPE, "file")
        key = EngineKey("a" * 64, "cpu", QuantConfig("int8"), text)
        return self.store.publish(EngineDraft(key, "tiny", (blob,)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
async def daemon(redis_url: str, tmp_path: Path) -> AsyncIterator[Daemon]:
    connection = connect(redis_url)
    store = LocalStore(tmp_path / "store")
    queue = BuildQueue(connection, redis_url, lease_s=60, max_queued=3)
    metrics = CompilerMetrics(CollectorRegistry())
    operations = Operations(connection, redis_url)
    compiler = Compiler(queue, operations, store, tmp_path / "cache", metrics, at_once_s=60)
    service = CompilerService(compiler, queue, store)
    server = DaemonServer("127.0.0.1:0", 1 << 20, CollectorRegistry())
    compiler_pb2_grpc.add_CompilerServiceServicer_to_server(service, server.grpc)
    await server.start()
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield Daemon(Client(channel), service, queue, store)
    await compiler.close()
    await server.grpc.stop(0)
    await connection.aclose()


async def resolved(daemon: Daemon, model: Path, *archs: str, scheme: str = "fp32") -> Any:
    """The operation of a request once its checkpoint was hashed; its builds wait."""
    operation = await daemon.client.ask(model, *archs, scheme=scheme)
    request = compiler_pb2.WatchOperationRequest(name=operation.name)
    async for response in daemon.stub.WatchOperation(request, timeout=60):
        if response.operation.state != compiler_pb2.OPERATION_STATE_RESOLVING:
            return response.operation
    raise AssertionError("the watch ended while the operation was resolving")


@pytest.mark.parametrize(
    ("uri", "arch", "scheme", "expected"),
    [
        ("", "cpu", "fp32", (INVALID, "INVALID_FIELD")),
        ("MODEL", "sm_7", "fp32", (INVALID, "UNSUPPORTED_ARCH")),
        ("MODEL", "cpu", "int3", (INVALID, "UNSUPPORTED_QUANT")),
        ("/no/such/model", "cpu", "fp32", (NOT_FOUND, "MODEL_NOT_FOUND")),
    ],
)
async def test_request_that_cannot_be_met_says_why(
    daemon: Daemon, model: Path, uri: str, arch: str, scheme: str, expected: Any
) -> None:
    call = daemon.client.ask(uri.replace("MODEL", str(model)), arch, scheme=scheme)
    code, reason, sentence = await refusal(call)
    assert (code, reason) == expected
    assert len(sentence) > 10
    assert "\n" not in sentence


async def test_request_without_archs_is_refused(daemon: Daemon, model: Path) -> None:
    code, reason, sentence = await refusal(daemon.client.ask(model))
    assert (code, reason) == (INVALID, "INVALID_FIELD")
    assert sentence.startswith("archs")


async def test_unknown_architecture_is_refused(daemon: Daemon, tmp_path: Path) -> None:
    broken = write_checkpoint(tmp_path / "broken", architectures=["NoSuchModel"])
    operation = await resolved(daemon, broken, "cpu")
    assert operation.state == compiler_pb2.OPERATION_STATE_FAILED
    assert reason_of(operation.error) == "UNSUPPORTED_MODEL"
    # Its files are known now, so that the call itself says so.
    code, reason, sentence = await refusal(daemon.client.ask(broken, "cpu"))
    assert (code, reason) == (INVALID, "UNSUPPORTED_MODEL")
    assert "NoSuchModel" in sentence


async def test_new_checkpoint_resolves_to_a_build_per_arch(daemon: Daemon, model: Path) -> None:
    operation = await daemon.client.ask(model, "cpu", "sm_90", scheme="bf16")
    assert operation.state == compiler_pb2.OPERATION_STATE_RESOLVING
    operation = await resolved(daemon, model, "cpu", "sm_90", scheme="bf16")
    assert [build.key.arch for build in operation.builds] == ["cpu", "sm_90"]
    assert {build.state for build in operation.builds} == {compiler_pb2.BUILD_STATE_QUEUED}
    assert await daemon.queue.num_waiting() == 1
    again = await daemon.client.ask(model, "cpu", "sm_90", scheme="bf16")
    assert again.state == compiler_pb2.OPERATION_STATE_RESOLVED
    assert [b.name for b in again.builds] == [b.name for b in operation.builds]


async def test_watch_takes_over_an_operation_whose_daemon_died(
    daemon: Daemon, model: Path, redis_url: str
) -> None:
    quant = engine_pb2.QuantConfig(scheme="fp32")
    request = compiler_pb2.BuildEngineRequest(model_uri=str(model), archs=["cpu"], quant=quant)
    record = OperationRecord(request, RESOLVING)
    connection = connect(redis_url)
    await Operations(connection, redis_url).begin(record)
    watch = daemon.stub.WatchOperation(
        compiler_pb2.WatchOperationRequest(name=record.name), timeout=60
    )
    states = [(await watch.read()).operation.state]
    # As after a minute without the other daemon; the event is there only to save time.
    await connection.delete(f"operation:{record.name.removeprefix('operations/')}")
    await connection.xadd(events_key(record.name), {"state": "gone"})
    while states[-1] == compiler_pb2.OPERATION_STATE_RESOLVING:
        states.append((await watch.read()).operation.state)
    watch.cancel()
    await connection.aclose()
    assert states[-1] == compiler_pb2.OPERATION_STATE_RESOLVED


async def test_renewing_an_operation_restores_it_and_leaves_a_resolved_one(redis_url: str) -> None:
    record = OperationRecord(compiler_pb2.BuildEngineRequest(model_uri="m"), RESOLVING)
    key = f"operation:{record.name.removeprefix('operations/')}"
    connection = connect(redis_url)
    operations = Operations(connection, redis_url)
    await operations.renew(record)
    assert (await operations.get(record.name)).state == RESOLVING
    assert 0 < await connection.ttl(key) <= RESOLVING_KEPT_S
    await operations.write(dataclasses.replace(record, state=RESOLVED))
    await operations.renew(record)
    assert (await operations.get(record.name)).state == RESOLVED
    assert await connection.ttl(key) > RESOLVING_KEPT_S
    await connection.aclose()


async def test_watch_of_an_operation_follows_its_builds(daemon: Daemon, model: Path) -> None:
    operation = await resolved(daemon, model, "cpu")
    watch = daemon.stub.WatchOperation(
        compiler_pb2.WatchOperationRequest(name=operation.name), timeout=60
    )
    states = [(await watch.read()).operation.builds[0].state]
    lease = await daemon.queue.lease("worker")
    assert lease is not None
    attempt = await daemon.queue.start("worker", lease, lease.digests[0])
    assert attempt is not None
    states.append((await watch.read()).operation.builds[0].state)
    await daemon.queue.beat("worker", attempt, BuildProgress("quantize", 0.5, 1, 2, 3.0))
    progress = (await watch.read()).operation.builds[0].progress
    assert (progress.stage, progress.fraction, progress.eta.seconds) == ("quantize", 0.5, 3)
    await daemon.queue.finish("worker", attempt, SUCCEEDED)
    states.append((await watch.read()).operation.builds[0].state)
    assert await watch.read() is grpc.aio.EOF
    assert states == [
        compiler_pb2.BUILD_STATE_QUEUED,
        compiler_pb2.BUILD_STATE_RUNNING,
        compiler_pb2.BUILD_STATE_SUCCEEDED,
    ]


async def test_cancelled_build_is_cancelled_and_asked_for_anew(daemon: Daemon, model: Path) -> None:
    operation = await resolved(daemon, model, "cpu")
    request = compiler_pb2.CancelBuildRequest(name=operation.builds[0].name)
    build = (await daemon.stub.CancelBuild(request, timeout=60)).build
    assert build.state == compiler_pb2.BUILD_STATE_CANCELLED
    again = await daemon.client.ask(model, "cpu")
    assert again.builds[0].state == compiler_pb2.BUILD_STATE_QUEUED


async def test_full_queue_is_refused_with_a_time_to_retry(daemon: Daemon, model: Path) -> None:
    await resolved(daemon, model, "cpu")
    for name in ("b1", "b2"):
        await daemon.queue.enqueue([job(name)])
    code, reason, _ = await refusal(daemon.client.ask(model, "sm_90", scheme="bf16"))
    assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "BUILD_QUEUE_FULL")


@pytest.mark.parametrize("name", ["builds/" + "0" * 64, "builds/xyz", "", "engines/" + "0" * 64])
async def test_unknown_build_is_not_found(daemon: Daemon, name: str) -> None:
    calls: tuple[tuple[Any, Any], ...] = (
        (daemon.stub.GetBuild, compiler_pb2.GetBuildRequest(name=name)),
        (daemon.stub.CancelBuild, compiler_pb2.CancelBuildRequest(name=name)),
    )
    for call, request in calls:
        assert (await refusal(call(request, timeout=60)))[:2] == (NOT_FOUND, "BUILD_NOT_FOUND")
    streams: tuple[tuple[Any, Any], ...] = (
        (daemon.stub.WatchBuild, compiler_pb2.WatchBuildRequest(name=name)),
        (daemon.stub.WatchOperation, compiler_pb2.WatchOperationRequest(name=name)),
    )
    for call, request in streams:
        found = await refusal(call(request, timeout=60).read())
        assert found[:2] == (NOT_FOUND, "BUILD_NOT_FOUND")


async def test_builds_are_listed_in_pages(daemon: Daemon) -> None:
    for name in ("b1", "b2", "b3"):
        await daemon.queue.enqueue([job(name)])
    first = await daemon.stub.ListBuilds(compiler_pb2.ListBuildsRequest(page_size=2), timeout=60)
    second = await daemon.stub.ListBuilds(
        compiler_pb2.ListBuildsRequest(page_size=2, page_token=first.next_page_token), timeout=60
    )
    uris = [build.model_uri for page in (first, second) for build in page.builds]
    assert uris == ["fake:b3", "fake:b2", "fake:b1"]
    assert second.next_page_token == ""


async def test_engines_are_listed_in_pages(daemon: Daemon) -> None:
    engines = [daemon.publish(text) for text in ("a", "b", "c")]
    names, token = [], ""
    while True:
        page = await daemon.stub.ListEngines(
            compiler_pb2.ListEnginesRequest(page_size=2, page_token=token), timeout=60
        )
        names += [engine.name for engine in page.engines]
        token = page.next_page_token
        if not token:
            break
    assert names == [engine.name for engine in reversed(engines)]


@pytest.mark.parametrize(("size", "token"), [(-1, ""), (1, "nonsense"), (1, "9" * 40)])
async def test_malformed_page_is_refused(daemon: Daemon, size: int, token: str) -> None:
    for call, request in (
        (daemon.stub.ListBuilds, compiler_pb2.ListBuildsRequest),
        (daemon.stub.ListEngines, compiler_pb2.ListEnginesRequest),
    ):
        found = await refusal(call(request(page_size=size, page_token=token), timeout=60))
        assert found[:2] == (INVALID, "INVALID_FIELD")


async def test_engine_is_found_by_prefix_and_deleted_by_full_name(daemon: Daemon) -> None:
    name = daemon.publish("a").name
    get = compiler_pb2.GetEngineRequest(name=name[:16])
    assert (await daemon.stub.GetEngine(get, timeout=60)).engine.name == name
    for wrong in (name[:16], "engines/" + "0" * 64):
        request = compiler_pb2.DeleteEngineRequest(name=wrong)
        found = await refusal(daemon.stub.DeleteEngine(request, timeout=60))
        assert found[:2] == (NOT_FOUND, "ENGINE_NOT_FOUND")
    await daemon.stub.DeleteEngine(compiler_pb2.DeleteEngineRequest(name=name), timeout=60)
    assert (await refusal(daemon.stub.GetEngine(get, timeout=60)))[1] == "ENGINE_NOT_FOUND"


async def test_engine_without_a_record_is_a_cached_build(daemon: Daemon) -> None:
    name = "builds/" + daemon.publish("a").key.digest
    build = (await daemon.stub.GetBuild(compiler_pb2.GetBuildRequest(name=name), timeout=60)).build
    assert build.cached
    watch = daemon.stub.WatchBuild(compiler_pb2.WatchBuildRequest(name=name), timeout=60)
    states = [response.build.state async for response in watch]
    assert states == [compiler_pb2.BUILD_STATE_SUCCEEDED]


async def test_without_redis_cached_engines_are_answered_and_the_rest_is_refused(
    daemon: Daemon, model: Path, embedded_redis: EmbeddedRedis
) -> None:
    operation = await resolved(daemon, model, "cpu")
    key = operation.builds[0].key
    blob = daemon.store.write_blob([b"x"], FILE_TYPE, "file")
    daemon.store.publish(
        EngineDraft(
            EngineKey(key.model_digest, "cpu", QuantConfig("fp32"), key.builder), "m", (blob,)
        )
    )
    embedded_redis.stop()
    again = await daemon.client.ask(model, "cpu")
    assert again.builds[0].cached
    engines = await daemon.stub.ListEngines(compiler_pb2.ListEnginesRequest(), timeout=60)
    get = compiler_pb2.GetEngineRequest(name=engines.engines[0].name)
    assert (await daemon.stub.GetEngine(get, timeout=60)).engine.name == get.name
    for call in (
        daemon.client.ask(model, "sm_90", scheme="bf16"),
        daemon.stub.ListBuilds(compiler_pb2.ListBuildsRequest(), timeout=60),
    ):
        code, reason, sentence = await refusal(call)
        assert (code, reason) == (grpc.StatusCode.UNAVAILABLE, "REDIS_UNREACHABLE")
        assert "does not answer" in sentence


async def test_watch_is_sent_elsewhere_when_the_daemon_drains(daemon: Daemon) -> None:
    await daemon.queue.enqueue([job("b1")])
    name = "builds/" + job("b1").key.digest
    watch = daemon.stub.WatchBuild(compiler_pb2.WatchBuildRequest(name=name), timeout=60)
    assert (await watch.read()).build.state == compiler_pb2.BUILD_STATE_QUEUED
    daemon.service.draining.set()
    code, reason, _ = await refusal(watch.read())
    assert (code, reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
