"""A gateway inside the test's own loop, in front of runtime daemons that echo: real gRPC."""

from collections import deque
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from millrace.fleet.v1 import fleet_pb2_grpc
from millrace.runtime.v1 import runtime_pb2 as pb
from millrace.runtime.v1 import runtime_pb2_grpc
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

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
from runtime_service.relay.relays import Relays
from shared.channels import PeerSecurity
from shared.security import ServerSecurity
from shared.server import OPEN, DaemonServer
from tests.runtime_service.daemon import HANG_S, Call, Daemon, Seen, running_daemon, until

PLAIN = PeerSecurity()
# Characters of one to four bytes, and what may become a stop string.
TEXT = "Zwölf Boxkämpfer 🙂 jagen STO Viktor; "


@dataclass
class RunningGateway:
    """What a test holds of a gateway and the runtimes behind it."""

    gateway: Gateway
    fleet: Fleet
    registry: CollectorRegistry
    server: DaemonServer
    http: HttpServer
    stub: Any
    fleet_stub: Any
    daemons: list[Daemon]

    def call(self) -> Call:
        """A new call of Generate."""
        return Call(self.stub.Generate())

    async def usable(self, num_runtimes: int) -> None:
        """Waits until so many runtimes take generations."""
        await until(lambda: sum(link.is_usable for link in self.fleet) == num_runtimes)

    def runs_on(self, daemon: Daemon) -> int:
        """What the gateway has there."""
        return next(link.num_runs for link in self.fleet if link.address == daemon.server.address)

    def busiest(self) -> Daemon:
        """The daemon that runs most."""
        return max(self.daemons, key=self.runs_on)

    def sample(self, name: str, **labels: str) -> float:
        """A metric's value."""
        return self.registry.get_sample_value(f"millrace_gateway_{name}", labels) or 0.0


@asynccontextmanager
async def running_gateway(
    addresses: list[str],
    daemons: list[Daemon],
    *,
    wait_s: float = 2 * HANG_S,
    keep_s: float = 60.0,
    silent_s: float = HANG_S,
    poll_s: float = 0.05,
    redis: Redis | None = None,
    security: ServerSecurity = OPEN,
    peers: PeerSecurity = PLAIN,
    compiler: str = "",
    relays: int = 0,
) -> AsyncIterator[RunningGateway]:
    """A gateway in front of these runtimes, which it has met."""
    fleet = Fleet(redis, tuple(addresses), LinkOptions(poll_s, silent_s, 1 << 20, peers))
    registry = CollectorRegistry()
    gateway = Gateway(fleet, GatewayMetrics(registry), wait_s, KeptGenerations(keep_s))
    entrance = Relays(relays, 4 << 20, security, "error") if relays else None
    server = DaemonServer("127.0.0.1:0", 4 << 20, registry, security, entrance)
    deployments = Deployments(redis) if redis is not None else None
    fleet_service = FleetService(fleet, deployments, "")
    add_services(server, gateway, fleet, fleet_service)
    builds = Builds(compiler, peers) if compiler else None
    routes = http_routes(gateway, fleet, fleet_service, builds)
    http = HttpServer("127.0.0.1:0", 1 << 20, server.edge, routes, security)
    await server.start(*SERVICES)
    await http.start()
    fleet.start()
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = runtime_pb2_grpc.RuntimeServiceStub(channel)
        fleet_stub = fleet_pb2_grpc.FleetServiceStub(channel)
        running = RunningGateway(gateway, fleet, registry, server, http, stub, fleet_stub, daemons)
        try:
            await running.usable(len(addresses))
            yield running
        finally:
            await http.stop()
            await server.stop()
            if builds is not None:
                await builds.close()
            await fleet.close()


@asynccontextmanager
async def running_fleet(
    folder: Path,
    num_runtimes: int = 2,
    *,
    wait_s: float = 2 * HANG_S,
    keep_s: float = 60.0,
    poll_s: float = 0.05,
    redis: Redis | None = None,
    gateway_security: ServerSecurity = OPEN,
    peers: PeerSecurity = PLAIN,
    compiler: str = "",
    gateway_relays: int = 0,
    **options: Any,
) -> AsyncIterator[RunningGateway]:
    """A gateway in front of so many new runtimes."""
    async with AsyncExitStack() as stack:
        daemons = [
            await stack.enter_async_context(running_daemon(folder / str(number), **options))
            for number in range(num_runtimes)
        ]
        addresses = [daemon.server.address for daemon in daemons]
        yield await stack.enter_async_context(
            running_gateway(
                addresses,
                daemons,
                wait_s=wait_s,
                keep_s=keep_s,
                poll_s=poll_s,
                redis=redis,
                security=gateway_security,
                peers=peers,
                compiler=compiler,
                relays=gateway_relays,
            )
        )


async def kill(daemon: Daemon) -> None:
    """Breaks every call of a runtime off, as the death of its process does."""
    await daemon.server.grpc.stop(0)


def is_whole(seen: Seen, prompt: list[int], num_tokens: int) -> None:
    """Asserts that nothing is missing and nothing came twice."""
    assert seen.finished is not None, seen.error
    expected = (prompt * (num_tokens // len(prompt) + 1))[:num_tokens]
    assert seen.token_ids[0] == expected
    assert seen.finished.usage.generated_tokens == num_tokens
    assert seen.finished.usage.prompt_tokens == seen.prompt_tokens == len(prompt)


class Unsendable(deque[pb.GenerateRequest]):
    """What cannot be sent, for a reason that nobody thought of."""

    def popleft(self) -> pb.GenerateRequest:
        raise RuntimeError("nobody thought of this")


def generation_id_of(call: Call) -> str:
    """By which the first generation of a call is resumed."""
    events = [event for message in call.messages for event in message.events]
    return next(event.started.generation_id for event in events if event.HasField("started"))
