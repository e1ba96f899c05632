"""The edge of the gateway's HTTP server, as `shared.edge` is that of its gRPC server.

Every request passes here, in and out: callers are authenticated, errors become answers, nothing
unforeseen leaks, and each request leaves one log line and its metrics. A route stands for an rpc:
it needs the same scope and counts as the same call. Routes know none of it.
"""

import asyncio
import logging
import re
import uuid
import zlib
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

import structlog
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from runtime_service.gateway.http.failures import failure, failure_of_http
from shared.channels import is_loopback
from shared.edge import EdgeInterceptor
from shared.errors import Draining, Internal, InvalidField, MillraceError
from shared.log import canonical_line
from shared.security import ServerSecurity
from shared.server import OPEN
from shared.settings import SettingsError, split_address
from shared.tls import server_context
from shared.tracing import TRACEPARENT, call_span

# How a body may be coded (RFC 9110, 8.4.1).
_PLAIN, _GZIP = "identity", "gzip"
_MAX_CODING_CHARS = 64
# How long a client may take to send a body, and a stopping server for its last answers.
BODY_TIMEOUT_S = 60.0
_LAST_GRACE_S = 0.5
# A stream that has begun, and what it came to: its status cannot say it any more.
_STREAM = web.RequestKey("stream", web.StreamResponse)
STREAM_ERROR = web.RequestKey("stream_error", MillraceError)
# Each request's name, in its answer and in the log lines that it leaves; a client may give its own.
_REQUEST_ID = "X-Request-Id"
_ID = web.RequestKey("id", str)
_A_CLIENTS_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
# What nginx logs where a client has closed its connection; nobody reads it.
_CLIENT_GONE = 499

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Route:
    """What answers `method` on `path`.

    Args:
        rpc: full name of the rpc that it stands for; "" is open to everybody.
        is_quiet: asked again and again: its log line is at DEBUG.
    """

    method: str
    path: str
    handle: Handler
    rpc: str = ""
    is_quiet: bool = False


def _library_log() -> logging.Logger:
    """The HTTP library's log, without what it says of clients that do not speak HTTP."""
    logger = logging.getLogger("millrace.http")
    logger.addFilter(_is_of_the_server)
    return logger


def _is_of_the_server(record: logging.LogRecord) -> bool:
    """Claims that it is no client's broken request; such a one is told in a line of ours.

    The library's has a traceback, and quotes the request: keys, and parts of prompts.
    """
    error = record.exc_info[1] if record.exc_info else None
    if not isinstance(error, HttpProcessingError):
        return True
    structlog.get_logger().info("http_not_understood", problem=type(error).__name__)
    return False


class HttpServer:
    """An HTTP server in this loop, not yet started.

    Args:
        listen: `host:port`; port 0 takes a free one (see `address`).
        max_body_bytes: of a request.
        edge: the gRPC server's; it drains and counts both.
        security: as the gRPC server's.
    Raises:
        SettingsError: `listen` is malformed, or needs more security.
    """

    def __init__(
        self,
        listen: str,
        max_body_bytes: int,
        edge: EdgeInterceptor,
        routes: Iterable[Route],
        security: ServerSecurity = OPEN,
    ) -> None:
        self._host, self._port = split_address(listen)
        security.check_listen(self._host)
        self._edge, self._security = edge, security
        app = web.Application(middlewares=[_told_as_json], client_max_size=max_body_bytes)
        app.on_response_prepare.append(_named)
        for route in routes:
            app.router.add_route(route.method, route.path, self._guarded(route))
        self._runner = web.AppRunner(
            app,
            access_log=None,
            handler_cancellation=True,
            shutdown_timeout=_LAST_GRACE_S,
            logger=_library_log(),
            # `body_of` does it: what the library cannot decode it refuses in words of its own.
            auto_decompress=False,
        )
        self.address = ""

    async def start(self) -> None:
        """Binds and answers.

        Raises:
            SettingsError: the address cannot be bound.
        """
        await self._runner.setup()
        tls = self._security.tls
        context = None if tls.cert is None else server_context(tls)
        host = self._host.strip("[]")
        try:
            await web.TCPSite(self._runner, host, self._port, ssl_context=context).start()
        except OSError as error:
            raise SettingsError(f"cannot serve HTTP on {host}:{self._port}: {error}") from None
        self.address = f"{self._host}:{self._runner.addresses[0][1]}"
        structlog.get_logger().info("http_started", address=self.address, tls=context is not None)

    async def stop(self) -> None:
        """Ends what still runs and closes."""
        await self._runner.cleanup()

    def _guarded(self, route: Route) -> Handler:
        rpc = f"{route.method} {route.path}"

        async def guarded(request: web.Request) -> web.StreamResponse:
            # One task serves all requests of a connection, each with a caller of its own.
            structlog.contextvars.clear_contextvars()
            structlog.contextvars.bind_contextvars(http_request_id=request[_ID])
            with self._edge.counted(rpc, str(request.remote)) as ended:
                with canonical_line("http_finished", is_quiet=route.is_quiet) as line:
                    response, code, reason = await self._traced(route, request)
                    ended["code"] = line["code"] = code
                    line["status"] = response.status
                    if reason:
                        line["reason"] = reason
                return response

        return guarded

    async def _traced(
        self, route: Route, request: web.Request
    ) -> tuple[web.StreamResponse, str, str]:
        """As `_outcome`; what is asked again and again makes no span."""
        if route.is_quiet:
            return await self._outcome(route, request)
        name = f"{route.method} {route.path}"
        attributes = {"http.request.method": route.method, "http.route": route.path}
        headers = ((TRACEPARENT, request.headers.get(TRACEPARENT, "")),)
        with call_span(name, headers, attributes) as said:
            response, code, reason = await self._outcome(route, request)
            if reason:
                said["error"] = reason
            return response, code, reason

    async def _outcome(
        self, route: Route, request: web.Request
    ) -> tuple[web.StreamResponse, str, str]:
        """The answer, and what metrics and the log call it: a code, and a reason or ""."""
        try:
            self._check_host(request)
            if route.rpc:
                shown = request.headers.get("Authorization", "")
                self._edge.admit(route.rpc, (("authorization", shown),), _identities(request))
            if self._edge.is_draining:
                raise Draining()
            response = await route.handle(request)
            error = request.get(STREAM_ERROR)
            return response, *(("OK", "") if error is None else (error.code.name, error.reason))
        except MillraceError as error:
            return failure(error), error.code.name, error.reason
        except web.HTTPException as error:
            return failure_of_http(error, request), "INVALID_ARGUMENT", ""
        except ConnectionError:
            return web.Response(status=_CLIENT_GONE), "CANCELLED", ""
        except Exception:
            structlog.get_logger().exception("http_failed_unforeseen")
            stream = request.get(_STREAM)
            if stream is not None and request.transport is not None:
                # Only that it breaks off can say now that it did not end well.
                request.transport.close()
            return stream or failure(Internal()), "INTERNAL", Internal.reason

    def _check_host(self, request: web.Request) -> None:
        """Raises InvalidField where a name leads here that could be any page's.

        A server that asks nobody who calls is this machine's alone. A page whose own name resolves
        to 127.0.0.1 would be of the same origin, and could read what the server says.
        """
        security = self._security
        knows_callers = security.api_keys is not None or security.tls.ca is not None
        if knows_callers or security.is_insecure or not is_loopback(self._host):
            return
        name = request.host
        host = name if name.endswith("]") else name.rpartition(":")[0] or name
        if not is_loopback(host):
            problem = f"must be localhost or a loopback address, found {host!r}"
            raise InvalidField(field="Host", problem=problem)


async def body_of(request: web.Request) -> bytes:
    """What was sent, which must be JSON: a page of another site could send any other form.

    Raises:
        InvalidField: it says that it is something else, takes too long to come, or is not coded
            as it says.
        web.HTTPRequestEntityTooLarge: it is over the limit, as it came or decoded.
    """
    coding = request.headers.get("Content-Encoding", "").strip().lower() or _PLAIN
    if coding not in (_PLAIN, _GZIP):
        problem = f"must be {_GZIP}, found {coding[:_MAX_CODING_CHARS]!r}"
        raise InvalidField(field="Content-Encoding", problem=problem)
    if request.content_type != "application/json":
        problem = f"must be application/json, found {request.content_type}"
        raise InvalidField(field="Content-Type", problem=problem)
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            body = await request.read()
    except TimeoutError:
        problem = f"did not come within {BODY_TIMEOUT_S:.0f} s"
        raise InvalidField(field="body", problem=problem) from None
    except (
        web.RequestPayloadError
    ) as error:  # of a malformed chunk, where aiohttp's parser is Python's
        raise InvalidField(field="body", problem=str(error)) from None
    if coding == _PLAIN:
        return body
    return await asyncio.to_thread(_unzipped, body, request.client_max_size)


def _unzipped(body: bytes, max_bytes: int) -> bytes:
    decoder = zlib.decompressobj(zlib.MAX_WBITS | 16)  # 16: gzip's header and check
    try:
        unzipped = decoder.decompress(body, max_bytes + 1)
    except zlib.error:
        raise InvalidField(field="body", problem="cannot be read as gzip") from None
    if len(unzipped) > max_bytes:
        raise web.HTTPRequestEntityTooLarge(max_bytes, len(unzipped))
    if not decoder.eof or decoder.unused_data:
        raise InvalidField(field="body", problem="ends before its gzip does, or goes on after it")
    return unzipped


async def open_stream(request: web.Request, content_type: str) -> web.StreamResponse:
    """An answer that is written piece by piece; its status, which is 200, is sent now."""
    response = web.StreamResponse()
    response.headers["Content-Type"] = content_type
    response.headers["Cache-Control"] = "no-cache"
    # Proxies that would collect the stream know this one.
    response.headers["X-Accel-Buffering"] = "no"
    await response.prepare(request)
    request[_STREAM] = response
    return response


@web.middleware
async def _told_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """What the library itself refuses looks like the other refusals, and has a name as they have."""
    given = request.headers.get(_REQUEST_ID, "")
    request[_ID] = given if _A_CLIENTS_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
    try:
        return await handler(request)
    except web.HTTPException as error:
        return failure_of_http(error, request)


async def _named(request: web.Request, response: web.StreamResponse) -> None:
    if _ID in request:
        response.headers[_REQUEST_ID] = request[_ID]
    # Which versions of what answer is nobody's business.
    response.headers["Server"] = "millrace"


def _identities(request: web.Request) -> tuple[bytes, ...]:
    """The names in the client's certificate, those that gRPC takes: the alternative ones, or CN."""
    shown = None if request.transport is None else request.transport.get_extra_info("peercert")
    if not shown:
        return ()
    names = [value for _, value in shown.get("subjectAltName", ())]
    if not names:
        rows = [pair for row in shown.get("subject", ()) for pair in row]
        names = [value for key, value in rows if key == "commonName"]
    return tuple(name.encode() for name in names)
