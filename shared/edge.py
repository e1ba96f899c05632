"""The edge of a gRPC server: every call passes here, in and out.

Callers are authenticated, errors become statuses, nothing unforeseen leaks, log context is bound,
and each call leaves one canonical log line and its metrics. Servicers behind it raise
`MillraceError`s and know none of it; `shared.auth.caller()` tells them who calls.
"""

import asyncio
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
)
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet
from google.rpc import status_pb2
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from shared.auth import ANYBODY, RPC_SCOPES, ApiKeys, set_caller, tenant_behind
from shared.errors import Draining, Internal, InvalidField, MillraceError, reason_of, to_status
from shared.log import canonical_line
from shared.tracing import call_span

_HEALTH = "/grpc.health."
_REFLECTION = "/grpc.reflection."
# Each start is a request of its own, which the runtime counts: such a call may carry many.
_COUNTED_PER_START = {
    "/millrace.runtime.v1.RuntimeService/Generate",
    "/millrace.runtime.v1.RuntimeService/GenerateStream",
    "/inference.GRPCInferenceService/ModelInfer",
    "/inference.GRPCInferenceService/ModelStreamInfer",
}
_STATUS_ATTRIBUTE = "rpc.response.status_code"
_STATUS_DETAILS = "grpc-status-details-bin"
_CODES = {code.value[0]: code for code in grpc.StatusCode}
_DURATION_BUCKETS_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)

_KINDS = {  # (requests stream, responses stream)
    (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
    (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
}

# Asked again and again by gateways, pages and probes: a line for each would bury the others.
_POLLED = {"GetStatus", "GetFleet", "ListBuilds", "ServerLive", "ServerReady", "ModelReady"}

Behaviour = Callable[[Any, Any], Any]
Metadata = Iterable[tuple[str, str | bytes]]


class EdgeInterceptor(grpc.aio.ServerInterceptor):
    """Guards all calls but health's, which are open; reflection's need any key, and no more.

    Set `is_draining` to refuse new calls with DRAINING.

    Args:
        api_keys: who may call; None asks nobody.
    """

    def __init__(self, registry: CollectorRegistry, api_keys: ApiKeys | None = None) -> None:
        self.is_draining = False
        self._api_keys = api_keys
        self._num_running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._total = Counter("millrace_rpcs", "Calls ended.", ["rpc", "code"], registry=registry)
        self._running = Gauge("millrace_rpcs_running", "Calls now.", ["rpc"], registry=registry)
        self._seconds = Histogram(
            "millrace_rpc_duration_seconds",
            "How long calls took; streams from start to end.",
            ["rpc"],
            buckets=_DURATION_BUCKETS_S,
            registry=registry,
        )

    async def wait_idle(self) -> None:
        """Returns when no guarded call runs."""
        await self._idle.wait()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The handler of a call, guarded."""
        handler = await continuation(handler_call_details)
        method: str = handler_call_details.method
        if handler is None or method.startswith(_HEALTH):
            return handler
        kind, make_handler = _KINDS[handler.request_streaming, handler.response_streaming]
        behaviour: Behaviour = getattr(handler, kind)

        async def guarded(request: Any, context: Any) -> Any:
            if handler.request_streaming:
                request = _well_formed(request)
            return await self._guard(method, behaviour, request, context)

        parse = _lenient(handler.request_deserializer)
        return make_handler(guarded, parse, handler.response_serializer)

    @contextmanager
    def counted(self, rpc: str, peer: str) -> Iterator[dict[str, str]]:
        """Counts and times a call while the block runs; the block says in `code` how it ended."""
        structlog.contextvars.bind_contextvars(rpc=rpc, peer=peer)
        start = time.monotonic()
        self._num_running += 1
        self._idle.clear()
        self._running.labels(rpc).inc()
        ended = {"code": "CANCELLED"}
        try:
            yield ended
        finally:
            self._total.labels(rpc, ended["code"]).inc()
            self._seconds.labels(rpc).observe(time.monotonic() - start)
            self._running.labels(rpc).dec()
            self._num_running -= 1
            if not self._num_running:
                self._idle.set()

    async def _guard(self, method: str, behaviour: Behaviour, request: Any, context: Any) -> Any:
        rpc = method.rpartition("/")[2]
        with self.counted(rpc, context.peer()) as ended:
            with canonical_line("rpc_finished", is_quiet=rpc in _POLLED) as line:
                result, status = await self._outcome(method, behaviour, request, context)
                ended["code"] = line["code"] = _CODES[status.code].name
                if status.code:
                    line["reason"] = reason_of(status)
            if status.code:
                await abort_with(context, status)
            return result

    async def _outcome(
        self, method: str, behaviour: Behaviour, request: Any, context: Any
    ) -> tuple[Any, status_pb2.Status]:
        name = method.removeprefix("/")
        if name.rpartition("/")[2] in _POLLED:
            return await self._answer(method, behaviour, request, context)
        attributes = {"rpc.system.name": "grpc", "rpc.method": name}
        with call_span(name, context.invocation_metadata() or (), attributes) as said:
            said[_STATUS_ATTRIBUTE] = "CANCELLED"
            result, status = await self._answer(method, behaviour, request, context)
            said[_STATUS_ATTRIBUTE] = _CODES[status.code].name
            if status.code:
                said["error"] = reason_of(status)
            return result, status

    async def _answer(
        self, method: str, behaviour: Behaviour, request: Any, context: Any
    ) -> tuple[Any, status_pb2.Status]:
        try:
            self.admit(method, context.invocation_metadata() or (), context.peer_identities() or ())
            if self.is_draining:
                raise Draining()
            if isinstance(request, _Malformed):
                raise not_a_message()
            if isinstance(request, Message):
                refuse_unknown_fields(request)
            return await _run(behaviour, request, context), status_pb2.Status()
        except MillraceError as error:
            return None, to_status(error)
        except Exception:
            structlog.get_logger().exception("rpc_failed_unforeseen")
            return None, to_status(Internal())

    def admit(self, method: str, metadata: Metadata, identities: Iterable[bytes]) -> None:
        """Makes the caller known to what runs in this call.

        Args:
            method: full name of the rpc; where another protocol is spoken, of its like.
            identities: names in the client's certificate, if it showed one.
        Raises:
            Unauthenticated, PermissionDenied, QuotaExceeded: the caller may not make it.
        """
        if self._api_keys is None:
            set_caller(replace(ANYBODY, tenant=tenant_behind(identities, metadata)))
            return
        principal = self._api_keys.authenticate(metadata)
        structlog.contextvars.bind_contextvars(tenant=principal.tenant, key=principal.key_id)
        if not method.startswith(_REFLECTION):
            principal.require(method.rpartition("/")[2], RPC_SCOPES.get(method, "admin"))
        if method not in _COUNTED_PER_START:
            principal.quota.count_request()
        set_caller(principal)


class _Malformed:
    """Stands for a request that is no message of its type; gRPC would call that our failure."""


def not_a_message() -> InvalidField:
    """Says that a request is no message of its type."""
    return InvalidField(field="message", problem="its bytes are no message of this method")


def _lenient(parse: Callable[[bytes], Message]) -> Callable[[bytes], Message | _Malformed]:
    def parse_or_stand_in(data: bytes) -> Message | _Malformed:
        try:
            return parse(data)
        except DecodeError:
            return _Malformed()

    return parse_or_stand_in


async def _well_formed(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        if isinstance(request, _Malformed):
            raise not_a_message()
        yield request


async def _run(behaviour: Behaviour, request: Any, context: Any) -> Any:
    result = behaviour(request, context)
    if not isinstance(result, AsyncGenerator):
        return await result
    async with aclosing(result) as responses:
        async for response in responses:
            await context.write(response)
    return None


async def abort_with(context: Any, status: status_pb2.Status) -> None:
    """Ends the call with `status`, its details included; does not return."""
    trailing = ((_STATUS_DETAILS, status.SerializeToString()),)
    await context.abort(_CODES[status.code], status.message, trailing)


def refuse_unknown_fields(message: Message) -> None:
    """Raises InvalidField where `message`, at any depth, holds a field that its type does not have.

    Else a newer client's field would be dropped silently, and the answer be to another question.
    The edge calls this for single requests; a servicer of a request stream calls it per message.
    """
    for unknown in UnknownFieldSet(message):  # type: ignore[attr-defined]
        raise InvalidField(
            field=f"{message.DESCRIPTOR.name}#{unknown.field_number}",
            problem="is unknown to this daemon; update the daemon or leave the field out",
        )
    for field, value in message.ListFields():
        kind = field.message_type
        if kind is None:
            continue
        if not field.is_repeated:
            refuse_unknown_fields(value)
        elif not kind.GetOptions().map_entry:
            for child in value:
                refuse_unknown_fields(child)
        elif kind.fields_by_name["value"].message_type is not None:
            for child in value.values():
                refuse_unknown_fields(child)
