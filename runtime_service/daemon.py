"""The runtime daemon: wires settings, engine source, runtime and server, and runs until a signal.

The first engine is looked for before anything else is awaited; torch is never imported here.
"""

import asyncio
import sys
from typing import TYPE_CHECKING, Any

import structlog
import uvloop
from millrace.runtime.v1 import runtime_pb2_grpc

from runtime_service.device import own_arch
from runtime_service.engine_client import EngineClient
from runtime_service.engine_core import OnPhase
from runtime_service.engine_interpreter import EngineInterpreter
from runtime_service.engine_process import EngineSpec
from runtime_service.engine_source import EngineSource
from runtime_service.engine_starter import OnLost, StartClient
from runtime_service.metrics import RuntimeMetrics
from runtime_service.relay.relays import relays_of
from runtime_service.runtime import Runtime
from runtime_service.served_engine import EngineText
from runtime_service.service import RuntimeService
from runtime_service.settings import RuntimeSettings, quant_named
from shared.background import Background
from shared.channels import PeerSecurity
from shared.engine import EngineManifest, EngineSelector
from shared.errors import MillraceError
from shared.log import configure_logging
from shared.process import process_age_s
from shared.security import ServerSecurity, peer_security
from shared.server import DaemonServer, daemon_registry, start_metrics
from shared.settings import SettingsError, exit_with
from shared.signing import TrustedKeys
from shared.store import ArtifactStore, LocalStore, open_store
from shared.store.cache import EngineCache
from shared.store.remote import GrpcStore
from shared.tracing import configure_tracing

if TYPE_CHECKING:
    from runtime_service.reconciler import Reconciler
    from runtime_service.registration import Registration

SERVICE = "millrace.runtime.v1.RuntimeService"
LOADER = "runtime_service.execution.loader:load_engine"

# After the drain's own grace: for last events to reach their readers.
_LAST_EVENTS_S = 2.0
_MOST_RETRY_S = 30.0
# Between looks at the deployment.
_MOST_LOOK_S = 1.0

_log = structlog.get_logger()


def run(waiting: EngineInterpreter) -> None:
    """Runs the daemon of this process's settings; `waiting` becomes its first engine process."""
    settings = RuntimeSettings.load()
    configure_logging(settings.log_level, settings.log_format, "runtime")
    try:
        configure_tracing("runtime")
        # Its turns cost half of asyncio's own; a stream's token takes several.
        uvloop.run(serve(settings, waiting=waiting))
    except (SettingsError, OSError) as error:
        exit_with(f"millrace-runtime: {error}")
    except MillraceError as error:
        sys.exit(f"millrace-runtime: {error}")


async def serve(
    settings: RuntimeSettings, loader: str = LOADER, waiting: EngineInterpreter | None = None
) -> None:
    """Serves until SIGTERM or SIGINT.

    Args:
        loader: what the engine process runs to load an engine; see `EngineSpec`.
        waiting: becomes the first engine process.
    Raises:
        MillraceError: the first engine cannot be served, and trying again will not help.
    """
    security, peers = ServerSecurity.load(settings), peer_security(settings)
    trusted = None if settings.trusted_keys is None else TrustedKeys.load(settings.trusted_keys)
    peers.check(settings.compiler)
    local, remote, cache = open_stores(settings, peers)
    source = EngineSource(local, remote, settings.compiler, peers, trusted, cache)
    metrics = RuntimeMetrics()
    changed = asyncio.Event()
    changed.set()
    runtime = Runtime(
        arch=settings.arch or own_arch(),
        source=source,
        read_text=lambda engine: EngineText.read(local, engine),
        start_client=_client_starter(settings, local, loader, waiting, metrics),
        metrics=metrics,
        on_change=changed.set,
        exchange_s=settings.exchange_s,
    )
    try:
        await _serve(settings, security, runtime, changed)
    finally:
        source.close()
        await runtime.close()


def open_stores(
    settings: RuntimeSettings, peers: PeerSecurity
) -> tuple[LocalStore, ArtifactStore | None, EngineCache | None]:
    """Where engines are kept here; where they come from, if from elsewhere; and whether what is here is a cache."""
    store = open_store(settings.store, peers)
    if not isinstance(store, LocalStore):
        local = LocalStore(settings.cache)
        return local, store, EngineCache(local, settings.cache_bytes)
    remote = GrpcStore(settings.compiler, peers) if settings.compiler else None
    return store, remote, None


async def _serve(
    settings: RuntimeSettings, security: ServerSecurity, runtime: Runtime, changed: asyncio.Event
) -> None:
    loading = asyncio.create_task(_load_first(settings, runtime))
    await asyncio.sleep(0)  # the engine is looked for and loaded while this one goes on
    registry = daemon_registry()
    registry.register(runtime.metrics)
    entrance = relays_of(settings.relays, settings, security)
    server = DaemonServer(settings.listen, settings.max_message_bytes, registry, security, entrance)
    service = RuntimeService(runtime)
    runtime_pb2_grpc.add_RuntimeServiceServicer_to_server(service, server.grpc)
    await server.start(SERVICE, is_serving=False)
    if settings.metrics_listen:
        start_metrics(settings.metrics_listen, registry, security)
    registration = _registration(settings, service, settings.advertise or server.address)
    if registration is not None:
        registration.start()
    background = Background()
    background.keep("tell_changes", lambda: tell_changes(server, runtime, registration, changed))
    reconciler = _reconciler(settings, runtime, service.runtime_id)
    following = background.keep("follow_deployment", reconciler.run) if reconciler else None

    async def drain() -> None:
        loading.cancel()
        if following is not None:
            following.cancel()
        # Starts are refused from here on; Redis, slow or gone, does not put that off.
        draining = asyncio.create_task(runtime.drain(settings.drain_s))
        if reconciler is not None:
            await reconciler.leave()
        if registration is not None:
            await registration.withdraw()
        await draining

    serving = asyncio.create_task(
        server.serve_until_signal(drain, settings.drain_s + _LAST_EVENTS_S)
    )
    try:
        # Serving ends in its own time; loading ends it only when it fails.
        await asyncio.wait({serving, loading}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done() and not loading.cancelled():
            loading.result()
        await serving
    finally:
        loading.cancel()
        serving.cancel()
        await background.close()
        await server.stop()
        if registration is not None:
            await registration.withdraw()


async def _load_first(settings: RuntimeSettings, runtime: Runtime) -> None:
    """Serves the engine of the settings; tries for as long as trying again may help."""
    if not settings.model:
        return
    selector = EngineSelector(settings.model, runtime.arch, quant_named(settings.quant))
    runtime.startup.before = (("start_daemon", process_age_s()),)
    delay_s = 1.0
    while True:
        try:
            await runtime.load(selector, settings.model_uri)
            return
        except MillraceError as error:
            if error.retry_after_s is None:
                raise
            _log.warning("engine_not_served_yet", reason=error.reason, problem=str(error))
        await asyncio.sleep(delay_s)
        delay_s = min(delay_s * 2, _MOST_RETRY_S)


async def tell_changes(
    server: DaemonServer,
    runtime: Runtime,
    registration: "Registration | None",
    changed: asyncio.Event,
) -> None:
    """Keeps health checks and the fleet's record true, from change to change."""
    while True:
        changed.clear()
        await server.set_serving(runtime.is_serving)
        if registration is not None:
            registration.refresh()
        await changed.wait()


def _registration(
    settings: RuntimeSettings, service: RuntimeService, address: str
) -> "Registration | None":
    if not settings.redis_url:
        return None
    # Imported where they are wanted: redis costs a start-up 100 ms.
    from runtime_service.registration import Registration
    from shared.redis import connect

    return Registration(
        connect(settings.redis_url),
        service.runtime_id,
        lambda: service.describe(address),
        settings.heartbeat_s,
    )


def _reconciler(
    settings: RuntimeSettings, runtime: Runtime, runtime_id: str
) -> "Reconciler | None":
    if not settings.redis_url or settings.model:
        return None
    from runtime_service.deployments import Deployments
    from runtime_service.reconciler import Reconciler
    from shared.redis import connect

    return Reconciler(
        runtime,
        Deployments(connect(settings.redis_url)),
        runtime_id,
        settings.deployment,
        min(settings.heartbeat_s, _MOST_LOOK_S),
        3 * settings.heartbeat_s,
    )


def load_arguments(
    settings: RuntimeSettings, local: LocalStore, engine: EngineManifest
) -> dict[str, Any]:
    """What `LOADER` is told of the engine, which lies in `local` and was found to be trusted."""
    chosen = ("max_sequence_tokens", "max_sequences", "max_step_tokens", "kv_bytes", "num_threads")
    return {
        "store": str(local.root),
        "engine": engine.name,
        "manifest": engine.manifest.digest,
        **{name: getattr(settings, name) or None for name in chosen},
    }


def _client_starter(
    settings: RuntimeSettings,
    local: LocalStore,
    loader: str,
    waiting: EngineInterpreter | None,
    metrics: RuntimeMetrics,
) -> StartClient:
    """Starts engine processes as the settings say."""

    async def start(engine: EngineManifest, on_lost: OnLost, on_phase: OnPhase) -> EngineClient:
        spec = EngineSpec(
            loader,
            load_arguments(settings, local, engine),
            engine.name,
            overlap=settings.overlap,
            log_level=settings.log_level,
            log_format=settings.log_format,
        )
        return await EngineClient.start(
            spec,
            metrics,
            waiting=waiting,
            max_waiting_tokens=settings.max_waiting_tokens,
            load_timeout_s=settings.load_timeout_s,
            step_timeout_s=settings.step_timeout_s,
            on_lost=on_lost,
            on_phase=on_phase,
        )

    return start
