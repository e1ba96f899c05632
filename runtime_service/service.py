"""millrace.runtime.v1 as gRPC sees it: decode, one call into the runtime, encode."""

import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from google.protobuf.duration_pb2 import Duration
from millrace.runtime.v1 import runtime_pb2 as pb
from millrace.runtime.v1 import runtime_pb2_grpc

from runtime_service.deployments import DeploymentProblem
from runtime_service.engine_client import EngineClient
from runtime_service.generate_calls import generate, generate_stream
from runtime_service.runtime import Runtime
from shared import wire
from shared.auth import caller
from shared.errors import FollowsDeployment, to_status


class RuntimeService(runtime_pb2_grpc.RuntimeServiceServicer):
    """Serves `runtime` to the network."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime_id = uuid.uuid4().hex[:12]
        self._runtime = runtime
        self._started_s = time.time()

    def Generate(
        self, request_iterator: AsyncIterator[pb.GenerateRequest], context: Any
    ) -> AsyncIterator[pb.GenerateResponse]:
        """Many generations on one call."""
        return generate(self._runtime, request_iterator, caller())

    def GenerateStream(
        self, request: pb.GenerateStreamRequest, context: Any
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        """One generation on one call; its error is the call's."""
        return generate_stream(self._runtime, request, caller())

    async def GetStatus(self, request: pb.GetStatusRequest, context: Any) -> pb.GetStatusResponse:
        """What is served and how busy it is."""
        runtime, served = self._runtime, self._runtime.served
        response = pb.GetStatusResponse(
            state=runtime.state,
            runtime_id=self.runtime_id,
            deployment=runtime.deployment,
            deployment_version=runtime.deployment_version,
            startup=[
                pb.StartupPhase(name=name, duration=_duration(seconds))
                for name, seconds in runtime.startup.phases
            ],
        )
        if (problem := runtime.deployment_problem) is not None:
            response.deployment_problem.CopyFrom(_problem(problem))
        response.start_time.FromMicroseconds(round(self._started_s * 1e6))
        if served is not None:
            response.engine.CopyFrom(wire.engine_to_proto(served.engine))
            response.limits.CopyFrom(_limits(served.client))
            response.load.CopyFrom(_load(served.client))
        response.load.generated_tokens = runtime.metrics.generated_tokens
        first_s = runtime.metrics.recent_first_token_s
        response.load.time_to_first_token.CopyFrom(_duration(first_s))
        return response

    async def LoadEngine(
        self, request: pb.LoadEngineRequest, context: Any
    ) -> pb.LoadEngineResponse:
        """Serves another engine."""
        if deployment := self._runtime.deployment:
            raise FollowsDeployment(deployment=deployment)
        selector = wire.selector_from_proto(request.selector)
        selector = replace(selector, arch=selector.arch or self._runtime.arch)
        engine = await self._runtime.load(selector, request.model_uri)
        return pb.LoadEngineResponse(engine=wire.engine_to_proto(engine))

    async def UnloadEngine(
        self, request: pb.UnloadEngineRequest, context: Any
    ) -> pb.UnloadEngineResponse:
        """Serves nothing."""
        await self._runtime.unload()
        return pb.UnloadEngineResponse()

    def describe(self, address: str) -> dict[str, str | int]:
        """The fields of this runtime's record in Redis."""
        runtime, served = self._runtime, self._runtime.served
        record: dict[str, str | int] = {
            "address": address,
            "arch": runtime.arch,
            "deployment": runtime.deployment,
            "state": pb.RuntimeState.Name(runtime.state).removeprefix("RUNTIME_STATE_").lower(),
        }
        if served is not None:
            load = _load(served.client)
            record |= {
                "engine": served.engine.name,
                "model": served.engine.model,
                "quant": str(served.engine.key.quant),
                "running_sequences": load.running_sequences,
                "waiting_sequences": load.waiting_sequences,
                "waiting_tokens": load.waiting_tokens,
                "free_blocks": load.free_blocks,
            }
        return record


def _limits(client: EngineClient) -> pb.RuntimeLimits:
    limits = client.limits
    return pb.RuntimeLimits(
        max_sequence_tokens=limits.max_sequence_tokens,
        max_sequences=limits.max_sequences,
        max_step_tokens=limits.max_step_tokens,
        max_waiting_tokens=client.max_waiting_tokens,
        block_tokens=limits.block_tokens,
        num_blocks=limits.num_blocks,
        kv_dtype=limits.kv_dtype,
        kv_bytes=limits.kv_bytes,
        kv_reason=limits.kv_reason,
    )


def _load(client: EngineClient) -> pb.RuntimeLoad:
    stats = client.stats
    return pb.RuntimeLoad(
        waiting_sequences=stats.num_waiting if stats else 0,
        running_sequences=stats.num_running if stats else 0,
        free_blocks=stats.num_free_blocks if stats else client.limits.num_blocks,
        waiting_tokens=client.waiting_tokens,
    )


def _problem(problem: DeploymentProblem) -> pb.DeploymentProblem:
    return pb.DeploymentProblem(
        deployment=problem.deployment.name,
        version=problem.deployment.version,
        status=to_status(problem.error),
    )


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration
