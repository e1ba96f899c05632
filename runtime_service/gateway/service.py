"""millrace.runtime.v1 as a gateway serves it: decode, one call, encode."""

import time
import uuid
from collections.abc import AsyncIterator, Iterable
from typing import Any

from millrace.runtime.v1 import runtime_pb2 as pb
from millrace.runtime.v1 import runtime_pb2_grpc

from runtime_service.gateway.fleet import Fleet
from runtime_service.gateway.gateway import Gateway
from runtime_service.generate_calls import generate, generate_stream
from shared.auth import caller
from shared.errors import NotARuntime


class GatewayRuntimeService(runtime_pb2_grpc.RuntimeServiceServicer):
    """Serves `gateway` to the network as if it were one runtime."""

    def __init__(self, gateway: Gateway, fleet: Fleet) -> None:
        self._gateway = gateway
        self._fleet = fleet
        self._id = uuid.uuid4().hex[:12]
        self._started_s = time.time()

    def Generate(
        self, request_iterator: AsyncIterator[pb.GenerateRequest], context: Any
    ) -> AsyncIterator[pb.GenerateResponse]:
        """Many generations on one call."""
        return generate(self._gateway, request_iterator, caller())

    def GenerateStream(
        self, request: pb.GenerateStreamRequest, context: Any
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        """One generation on one call; its error is the call's."""
        return generate_stream(self._gateway, request, caller())

    async def GetStatus(self, request: pb.GetStatusRequest, context: Any) -> pb.GetStatusResponse:
        """The fleet as one runtime: the engine and limits of one, the load of all."""
        usable = [link for link in self._fleet if link.is_usable]
        response = pb.GetStatusResponse(runtime_id=self._id, state=pb.RUNTIME_STATE_IDLE)
        response.start_time.FromMicroseconds(round(self._started_s * 1e6))
        if usable:
            response.state = pb.RUNTIME_STATE_SERVING
            first = min(usable, key=lambda link: link.address).status
            response.engine.CopyFrom(first.engine)
            response.limits.CopyFrom(first.limits)
            response.load.CopyFrom(_sum(link.status.load for link in usable))
        return response

    async def LoadEngine(
        self, request: pb.LoadEngineRequest, context: Any
    ) -> pb.LoadEngineResponse:
        """Refused: deployments say what a fleet serves."""
        raise NotARuntime()

    async def UnloadEngine(
        self, request: pb.UnloadEngineRequest, context: Any
    ) -> pb.UnloadEngineResponse:
        """Refused likewise."""
        raise NotARuntime()


def _sum(loads: Iterable[pb.RuntimeLoad]) -> pb.RuntimeLoad:
    total = pb.RuntimeLoad()
    for load in loads:
        total.waiting_sequences += load.waiting_sequences
        total.running_sequences += load.running_sequences
        total.free_blocks += load.free_blocks
        total.waiting_tokens += load.waiting_tokens
        total.generated_tokens += load.generated_tokens
    return total
