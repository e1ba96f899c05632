"""The gateway daemon: wires settings, fleet, gateway and server, and runs until a signal."""

import asyncio

from runtime_service.deployments import Deployments
from runtime_service.gateway.faces import SERVICES, add_services, http_routes
from runtime_service.gateway.fleet import Fleet
from runtime_service.gateway.fleet_service import FleetService
from runtime_service.gateway.gateway import Gateway
from runtime_service.gateway.http.page import Builds
from runtime_service.gateway.http.server import HttpServer
from runtime_service.gateway.kept import KeptGenerations
from runtime_service.gateway.metrics import GatewayMetrics
from runtime_service.gateway.runtime_link import LinkOptions
from runtime_service.gateway.settings import GatewaySettings
from runtime_service.relay.relays import relays_of
from shared.background import Background
from shared.log import configure_logging
from shared.redis import connect
from shared.security import ServerSecurity, peer_security
from shared.server import DaemonServer, daemon_registry, start_metrics
from shared.settings import SettingsError, exit_with
from shared.tracing import configure_tracing

# After the drain's own grace: for last events to reach their readers.
_LAST_EVENTS_S = 2.0


def run() -> None:
    """Runs the daemon of this process's settings."""
    settings = GatewaySettings.load()
    configure_logging(settings.log_level, settings.log_format, "gateway")
    try:
        configure_tracing("gateway")
        asyncio.run(serve(settings))
    except SettingsError as error:
        exit_with(f"millrace-gateway: {error}")


async def serve(settings: GatewaySettings) -> None:
    """Serves until SIGTERM or SIGINT."""
    redis = connect(settings.redis_url) if settings.redis_url else None
    security, peers = ServerSecurity.load(settings), peer_security(settings)
    options = LinkOptions(settings.poll_s, settings.silent_s, settings.max_message_bytes, peers)
    fleet = Fleet(redis, settings.runtimes, options)
    registry = daemon_registry()
    kept = KeptGenerations(settings.keep_s)
    gateway = Gateway(fleet, GatewayMetrics(registry), settings.wait_s, kept)
    entrance = relays_of(settings.relays, settings, security)
    server = DaemonServer(settings.listen, settings.max_message_bytes, registry, security, entrance)
    deployments = Deployments(redis) if redis is not None else None
    fleet_service = FleetService(fleet, deployments, settings.redis_url)
    add_services(server, gateway, fleet, fleet_service)
    builds = Builds(settings.compiler, peers) if settings.compiler else None
    http = None
    if settings.http_listen:
        routes = http_routes(gateway, fleet, fleet_service, builds)
        http = HttpServer(
            settings.http_listen, settings.max_message_bytes, server.edge, routes, security
        )
    changed = asyncio.Event()
    fleet.on_change(changed.set)
    background = Background()
    fleet.start()
    try:
        await server.start(*SERVICES, is_serving=False)
        background.keep("tell_health", lambda: _tell_health(server, gateway, changed))
        if http is not None:
            await http.start()
        if settings.metrics_listen:
            start_metrics(settings.metrics_listen, registry, security)
        await server.serve_until_signal(
            lambda: gateway.drain(settings.drain_s), settings.drain_s + _LAST_EVENTS_S
        )
    finally:
        await background.close()
        await server.stop()
        if http is not None:
            await http.stop()
        if builds is not None:
            await builds.close()
        await fleet.close()
        if redis is not None:
            await redis.aclose()


async def _tell_health(server: DaemonServer, gateway: Gateway, changed: asyncio.Event) -> None:
    while True:
        changed.clear()
        await server.set_serving(gateway.is_serving)
        await changed.wait()
