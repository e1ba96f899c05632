"""Every call of a relay: own streams of many clients join one call, all others pass byte by byte."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import TypeAlias

import grpc
from google.protobuf.message import DecodeError
from millrace.runtime.v1 import runtime_pb2 as pb

from runtime_service.generate_calls import generate_stream
from runtime_service.relay.joined_calls import Caller, JoinedCalls
from shared.auth import ANYBODY, RPC_SCOPES, TENANT_METADATA, tenant_behind
from shared.edge import abort_with, not_a_message, refuse_unknown_fields
from shared.errors import MillraceError, to_status
from shared.tracing import TRACEPARENT

OWN_STREAM = "/millrace.runtime.v1.RuntimeService/GenerateStream"
_OPEN = ("/grpc.health.", "/grpc.reflection.")
# gRPC's own, which it makes anew for each hop.
_HOP = {"user-agent", "content-type", "te"}


Context: TypeAlias = "grpc.aio.ServicerContext[bytes, bytes]"


class Proxy(grpc.GenericRpcHandler):
    """Handles all methods.

    Args:
        upstream: to the daemon.
        names_callers: see `RelayOptions`.
    """

    def __init__(self, upstream: grpc.aio.Channel, names_callers: bool) -> None:
        self._upstream = upstream
        self._names_callers = names_callers
        self._joined = JoinedCalls(upstream)

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> "grpc.RpcMethodHandler[bytes, bytes] | None":
        """The handler of a call. On the wire a single message is a stream of one.

        What no daemon of ours has is refused here: an answer that comes before a call of gRPC's asyncio has sent
        its head becomes INTERNAL there.
        """
        method = handler_call_details.method
        if method not in RPC_SCOPES and not method.startswith(_OPEN):
            return None
        if method == OWN_STREAM:
            return grpc.unary_stream_rpc_method_handler(self._own_stream)
        return grpc.stream_stream_rpc_method_handler(partial(self._pass, method))

    async def _pass(self, method: str, requests: AsyncIterator[bytes], context: Context) -> None:
        make_call: grpc.aio.StreamStreamMultiCallable[bytes, bytes]
        make_call = self._upstream.stream_stream(method)
        call = make_call(
            requests, metadata=self._metadata(context), timeout=context.time_remaining()
        )
        try:
            async for response in call:
                await context.write(response)
        except grpc.aio.AioRpcError as error:
            await context.abort(
                error.code(), error.details() or "", tuple(error.trailing_metadata() or ())
            )
        finally:
            call.cancel()

    async def _own_stream(self, data: bytes, context: Context) -> None:
        try:
            try:
                request = pb.GenerateStreamRequest.FromString(data)
            except DecodeError:
                raise not_a_message() from None
            refuse_unknown_fields(request)
            metadata = self._metadata(context)
            _follow_trace(request, metadata)
            caller = Caller.of(metadata)
            stream = generate_stream(self._joined.of(caller), request, ANYBODY)
            # However it ends, the daemon hears of it now and not when the generator is collected.
            async with aclosing(stream) as responses:
                async for response in responses:
                    await context.write(response.SerializeToString())
        except MillraceError as error:
            await abort_with(context, to_status(error))

    def _metadata(self, context: Context) -> tuple[tuple[str, str | bytes], ...]:
        metadata = tuple(
            (key, value)
            for key, value in context.invocation_metadata() or ()
            if key not in _HOP and not key.startswith("grpc-")
        )
        identities = context.peer_identities() or () if self._names_callers else ()
        if not identities:
            return metadata
        tenant = tenant_behind(identities, metadata)
        rest = tuple(pair for pair in metadata if pair[0] != TENANT_METADATA)
        return (*rest, (TENANT_METADATA, tenant.encode()))


def _follow_trace(
    request: pb.GenerateStreamRequest, metadata: tuple[tuple[str, str | bytes], ...]
) -> None:
    """A joined call serves many traces: the generation itself says whose it is."""
    for key, value in metadata:
        if key == TRACEPARENT and request.HasField("start") and not request.start.traceparent:
            request.start.traceparent = str(value)
