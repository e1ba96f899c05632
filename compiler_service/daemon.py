"""The compile daemon: store, queue, worker and server, wired as the settings say."""

import asyncio
import os
import secrets
import socket
import sys

import structlog
from millrace.artifact.v1 import artifact_pb2_grpc
from millrace.compiler.v1 import compiler_pb2_grpc
from prometheus_client import CollectorRegistry

from compiler_service.artifact_service import ArtifactService
from compiler_service.build_queue import BuildQueue
from compiler_service.compiler import Compiler
from compiler_service.metrics import CompilerMetrics
from compiler_service.operations import Operations
from compiler_service.service import CompilerService
from compiler_service.settings import CompilerSettings
from compiler_service.worker import BuildStore, Worker
from shared.background import Background
from shared.errors import MillraceError, RedisUnreachable, StoreUnreachable
from shared.redis import EmbeddedRedis, connect, public_url
from shared.security import ServerSecurity
from shared.server import DaemonServer, daemon_registry, start_metrics
from shared.store import EngineStore, LocalStore

SERVICES = ("millrace.compiler.v1.CompilerService", "millrace.artifact.v1.ArtifactService")
# OpenMP's threads that wait must not spin: beside other work they would keep each other from a core,
# and a build on a busy machine takes several times as long.
BUILD_CHILD = (
    *("env", "OMP_WAIT_POLICY=PASSIVE", "GOMP_SPINCOUNT=0"),
    *(sys.executable, "-m", "compiler_service.build_child"),
)

_SAMPLE_S = 5.0
_SWEEP_S = 3600.0


async def serve(
    settings: CompilerSettings, redis_url: str, embedded: EmbeddedRedis | None = None
) -> None:
    """Serves and builds until SIGTERM or SIGINT, then returns what it was building.

    Args:
        embedded: the Redis at that URL, where it is this daemon's own, to be kept running.
    """
    registry = daemon_registry()
    metrics = CompilerMetrics(registry)
    store = settings.open_store()
    settings.cache_dir.mkdir(parents=True, exist_ok=True)
    local = store if isinstance(store, LocalStore) else LocalStore(settings.cache_dir / "store")
    try:
        await asyncio.to_thread(store.check)
    except StoreUnreachable as error:  # it may come up later than we do
        structlog.get_logger().warning("store_unreachable", problem=str(error))
    client = connect(redis_url)
    queue = BuildQueue(client, redis_url, settings.lease_s, settings.max_queued)
    operations = Operations(client, redis_url)
    compiler = Compiler(queue, operations, store, settings.cache_dir, metrics)
    service = CompilerService(compiler, queue, store)
    server, metrics_address = await _start_server(settings, registry, service, store)
    structlog.get_logger().info(
        "compiler_started", redis=public_url(redis_url), store=store.url,
        worker=settings.worker, lease_s=settings.lease_s, metrics=metrics_address,
    )  # fmt: skip
    background = Background()
    if embedded is not None:
        background.keep("keep_redis", embedded.keep_running)
    background.keep("sample_queue", lambda: _sample_queue(queue, metrics))
    background.keep("sweep_store", lambda: sweep_regularly(local))
    if settings.worker:
        target = BuildStore(store.url, local.root, settings.cache_bytes)
        worker = Worker(queue, _worker_name(), BUILD_CHILD, target, settings.cache_dir, metrics)
        background.keep("build", worker.run)

    async def drain() -> None:
        service.draining.set()
        await asyncio.gather(compiler.close(), background.close())

    try:
        await server.serve_until_signal(drain, settings.drain_s)
    finally:
        await background.close()
        await server.stop()
        await client.aclose()


async def _start_server(
    settings: CompilerSettings,
    registry: CollectorRegistry,
    service: CompilerService,
    store: EngineStore,
) -> tuple[DaemonServer, str]:
    security = ServerSecurity.load(settings)
    server = DaemonServer(settings.listen, settings.max_message_bytes, registry, security)
    compiler_pb2_grpc.add_CompilerServiceServicer_to_server(service, server.grpc)
    artifact_pb2_grpc.add_ArtifactServiceServicer_to_server(ArtifactService(store), server.grpc)
    metrics_address = ""
    if settings.metrics_listen:
        metrics_address = start_metrics(settings.metrics_listen, registry, security)
    await server.start(*SERVICES)
    return server, metrics_address


async def _sample_queue(queue: BuildQueue, metrics: CompilerMetrics) -> None:
    while True:
        try:
            metrics.waiting.set(await queue.num_waiting())
        except RedisUnreachable:
            metrics.waiting.set(float("nan"))
        await asyncio.sleep(_SAMPLE_S)


async def sweep_regularly(store: LocalStore, interval_s: float = _SWEEP_S) -> None:
    """Frees, now and then, what deleted engines have left; until cancelled."""
    while True:
        await asyncio.sleep(interval_s)
        try:
            swept = await asyncio.to_thread(store.sweep)
        except (MillraceError, OSError) as error:
            structlog.get_logger().warning("sweep_failed", error=str(error))
            continue
        structlog.get_logger().info("store_swept", result=repr(swept))


def _worker_name() -> str:
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
