"""The gateway's web page, and what it shows: the fleet, and builds where a compile daemon is known.

The page is one file without a build step, and loads nothing from elsewhere; its browser is told to
run nothing but what stands in it.
"""

import base64
import hashlib
import re
from pathlib import Path

import grpc
from aiohttp import web
from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message
from millrace.compiler.v1 import compiler_pb2, compiler_pb2_grpc
from millrace.fleet.v1 import fleet_pb2

from runtime_service.gateway.fleet_service import FleetService
from runtime_service.gateway.gateway import Gateway
from runtime_service.gateway.http.server import Route
from shared.channels import PeerSecurity
from shared.errors import of_compiler

PAGE = Path(__file__).with_name("page.html")

_MAX_BUILDS = 20
_COMPILER_TIMEOUT_S = 5.0


class Builds:
    """The builds of the compile daemon at `address`."""

    def __init__(self, address: str, peers: PeerSecurity) -> None:
        self._address = address
        self._channel = peers.aio_channel(address)
        self._stub: compiler_pb2_grpc.CompilerServiceAsyncStub
        self._stub = compiler_pb2_grpc.CompilerServiceStub(self._channel)

    async def list(self) -> compiler_pb2.ListBuildsResponse:
        """The newest ones.

        Raises:
            CompilerUnreachable: it does not answer, or refuses the gateway.
        """
        request = compiler_pb2.ListBuildsRequest(page_size=_MAX_BUILDS)
        try:
            return await self._stub.ListBuilds(request, timeout=_COMPILER_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise of_compiler(error, self._address) from error

    async def close(self) -> None:
        """Leaves it."""
        await self._channel.close()


class Page:
    """The page and its data.

    Args:
        builds: None where no compile daemon is known.
    """

    def __init__(self, gateway: Gateway, fleet: FleetService, builds: Builds | None) -> None:
        self._gateway, self._fleet, self._builds = gateway, fleet, builds
        self._html = PAGE.read_bytes()
        self._headers = {
            "Content-Security-Policy": _policy(self._html.decode()),
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        }

    def routes(self) -> tuple[Route, ...]:
        """What it answers."""
        fleet = "/millrace.fleet.v1.FleetService/GetFleet"
        builds = "/millrace.compiler.v1.CompilerService/ListBuilds"
        return (
            Route("GET", "/", self.show),
            Route("GET", "/health", self.tell_health, is_quiet=True),
            # As load balancers ask.
            Route("HEAD", "/health", self.tell_health, is_quiet=True),
            Route("GET", "/api/fleet", self.show_fleet, fleet, is_quiet=True),
            Route("GET", "/api/builds", self.show_builds, builds, is_quiet=True),
        )

    async def show(self, request: web.Request) -> web.StreamResponse:
        """The page; it asks for a key itself where the daemon does."""
        return web.Response(body=self._html, content_type="text/html", charset="utf-8",
                            headers=self._headers)  # fmt: skip

    async def tell_health(self, request: web.Request) -> web.StreamResponse:
        """200 while there is a runtime that takes generations, else 503."""
        is_serving = self._gateway.is_serving
        return web.Response(status=200 if is_serving else 503)

    async def show_fleet(self, request: web.Request) -> web.StreamResponse:
        """FleetService.GetFleet as JSON."""
        return _json(await self._fleet.GetFleet(fleet_pb2.GetFleetRequest(), None))

    async def show_builds(self, request: web.Request) -> web.StreamResponse:
        """CompilerService.ListBuilds as JSON; of no compile daemon there are none."""
        if self._builds is None:
            return _json(compiler_pb2.ListBuildsResponse())
        return _json(await self._builds.list())


def _json(message: Message) -> web.Response:
    text = MessageToJson(
        message,
        preserving_proto_field_name=True,
        always_print_fields_with_no_presence=True,
        indent=None,
    )
    return web.Response(text=text, content_type="application/json")


def _policy(html: str) -> str:
    """A Content-Security-Policy that lets `html`'s own script and style run, by their hashes."""
    allowed = {
        tag: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
            for text in re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        )
        for tag in ("script", "style")
    }
    return (
        f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; "
        "require-trusted-types-for 'script'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
