"""A daemon's gRPC server: the edge around its servicers, health, reflection, metrics, draining.

Both daemons use it the same way:

    security = ServerSecurity.load(settings)
    server = DaemonServer(settings.listen, settings.max_message_bytes, registry, security)
    add_CompilerServiceServicer_to_server(servicer, server.grpc)
    await server.start("millrace.compiler.v1.CompilerService")
    await server.serve_until_signal(drain, settings.drain_s)
"""

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

import grpc
import prometheus_client
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry

from shared.background import FAILURES
from shared.channels import is_loopback
from shared.edge import EdgeInterceptor
from shared.security import ServerSecurity
from shared.settings import SettingsError, split_address
from shared.tls import TlsFiles

# Asks nobody, and therefore listens on loopback alone.
OPEN = ServerSecurity()

# What remains after draining (health watchers, refused calls) is given this long.
_LAST_GRACE_S = 0.5


class Entrance(Protocol):
    """Processes that listen in a server's place and pass on to it what they take."""

    # Where the server itself listens, for them alone, and what a message may have more there.
    inner_listen: str
    envelope_bytes: int

    async def open(self, listen: str) -> str:
        """Takes calls at `listen` from now on; returns the bound `host:port`.

        Raises:
            SettingsError: the address cannot be bound.
        """

    async def close(self) -> None:
        """Passes on what is there, and takes nothing more; a no-op where it is closed."""


class DaemonServer:
    """A gRPC server that is not yet started; add servicers to `grpc`, then `start`.

    Args:
        listen: `host:port`; port 0 takes a free one (see `address`).
        registry: gets the metrics of every call.
        security: what is asked of callers; by default nothing, on loopback alone.
        entrance: listens in its place; None: it does so itself.
    Raises:
        SettingsError: `listen` is malformed, or needs more security.
    """

    def __init__(
        self,
        listen: str,
        max_message_bytes: int,
        registry: CollectorRegistry,
        security: ServerSecurity = OPEN,
        entrance: Entrance | None = None,
    ) -> None:
        security.check_listen(split_address(listen)[0])
        self._security = security
        self.edge = EdgeInterceptor(registry, security.api_keys)
        self.grpc = grpc.aio.server(
            interceptors=(self.edge,),
            options=server_options(
                max_message_bytes + (entrance.envelope_bytes if entrance else 0)
            ),
        )
        self._listen, self._entrance = listen, entrance
        self._health = health.aio.HealthServicer()
        self.address = ""

    async def start(self, *services: str, is_serving: bool = True) -> None:
        """Binds and answers calls.

        Args:
            services: full names of the added services, for health and reflection.
            is_serving: what health says at first; `set_serving` changes it.

        Raises:
            SettingsError: the address cannot be bound.
        """
        self._services = ("", *services)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        reflection.enable_server_reflection(
            (*services, health.SERVICE_NAME, reflection.SERVICE_NAME), self.grpc
        )
        credentials = self._security.credentials()
        if self._entrance is None:
            port = self._bind(self._listen, credentials)
            self.address = f"{split_address(self._listen)[0]}:{port}"
        else:
            self._bind(self._entrance.inner_listen, None)
        await self.set_serving(is_serving)
        await self.grpc.start()
        if self._entrance is not None:
            self.address = await self._entrance.open(self._listen)
        structlog.get_logger().info(
            "server_started",
            address=self.address,
            tls=credentials is not None,
            api_keys=self._security.api_keys is not None,
        )

    async def stop(self, grace_s: float = 0.0) -> None:
        """Ends; calls that still run have so long to end by themselves."""
        await self.grpc.stop(grace_s)
        if self._entrance is not None:
            await self._entrance.close()

    async def set_serving(self, is_serving: bool) -> None:
        """Tells health checks whether calls are welcome; ignored once draining has begun."""
        states = health_pb2.HealthCheckResponse
        for service in self._services:
            await self._health.set(service, states.SERVING if is_serving else states.NOT_SERVING)

    async def serve_until_signal(
        self, drain: Callable[[], Awaitable[None]], grace_s: float
    ) -> None:
        """Serves until SIGTERM or SIGINT, then drains and stops.

        Draining: health says NOT_SERVING, new calls are refused with DRAINING, `drain` runs,
        running calls end by themselves. What is left after `grace_s`, or at a second signal, is
        cancelled.
        """
        signals = [asyncio.Event(), asyncio.Event()]

        def on_signal() -> None:
            signals[signals[0].is_set()].set()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
        await signals[0].wait()
        start = time.monotonic()
        structlog.get_logger().info("draining_started", grace_s=grace_s)
        self.edge.is_draining = True
        await self._health.enter_graceful_shutdown()
        is_complete = await _run_until(self._drained(drain), signals[1], grace_s)
        await self.stop(_LAST_GRACE_S)
        structlog.get_logger().info(
            "server_stopped",
            is_drained=is_complete,
            duration_s=round(time.monotonic() - start, 3),
        )

    def _bind(self, listen: str, credentials: grpc.ServerCredentials | None) -> int:
        try:
            if credentials is None:
                return int(self.grpc.add_insecure_port(listen))
            return int(self.grpc.add_secure_port(listen, credentials))
        except RuntimeError:  # gRPC's own words only name the address again
            raise SettingsError(
                f"cannot listen on {listen}: another process does, or it is no address of this machine"
            ) from None

    async def _drained(self, drain: Callable[[], Awaitable[None]]) -> None:
        await drain()
        await self.edge.wait_idle()


def start_metrics(listen: str, registry: CollectorRegistry, security: ServerSecurity = OPEN) -> str:
    """Serves `registry` to Prometheus over HTTP from a thread; returns the bound `host:port`.

    Off loopback it is HTTPS with the server's certificate where there is one, and asks for clients'
    ones where the server does. The files are read once.

    Raises:
        SettingsError: the address cannot be bound, or needs more security.
    """
    host, port = split_address(listen)
    security.check_metrics_listen(host)
    tls = TlsFiles() if is_loopback(host) else security.tls
    try:
        server, _ = prometheus_client.start_http_server(
            port,
            host.strip("[]"),
            registry,
            certfile=_text(tls.cert),
            keyfile=_text(tls.key),
            client_cafile=_text(tls.ca),
            client_auth_required=tls.ca is not None,
        )
    except OSError as error:
        raise SettingsError(f"cannot serve metrics on {listen}: {error}") from None
    address = f"{host}:{server.server_port}"
    structlog.get_logger().info("metrics_started", address=address, tls=tls.cert is not None)
    return address


def message_options(max_message_bytes: int) -> tuple[tuple[str, int], ...]:
    """What a message may have, either way."""
    return (
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
    )


def server_options(
    max_message_bytes: int, *, shares_port: bool = False
) -> tuple[tuple[str, int], ...]:
    """How every server of ours treats its connections.

    Args:
        shares_port: others listen on the same port, and the kernel divides connections among them.
            Two daemons there would share their calls silently.
    """
    return (
        *message_options(max_message_bytes),
        ("grpc.so_reuseport", int(shares_port)),
        # Finds clients that vanished without closing.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
    )


def daemon_registry() -> CollectorRegistry:
    """A registry that already tells about the process: memory, CPU, files, Python, what failed in the background."""
    registry = CollectorRegistry()
    prometheus_client.ProcessCollector(registry=registry)
    prometheus_client.PlatformCollector(registry=registry)
    prometheus_client.GCCollector(registry=registry)
    registry.register(FAILURES)
    return registry


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


async def _run_until(work: Awaitable[None], stop: asyncio.Event, limit_s: float) -> bool:
    """Runs `work`; cancels it at `stop` or after `limit_s`. Whether it ended by itself."""
    task = asyncio.ensure_future(work)
    stopped = asyncio.ensure_future(stop.wait())
    await asyncio.wait({task, stopped}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
        return False
    task.result()
    return True
