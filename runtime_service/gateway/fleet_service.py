"""millrace.fleet.v1 as gRPC sees it: the runtimes that there are, and what they are to serve."""

import re
from typing import Any

from millrace.engine.v1 import engine_pb2
from millrace.fleet.v1 import fleet_pb2 as pb
from millrace.fleet.v1 import fleet_pb2_grpc
from redis.exceptions import RedisError

from runtime_service.deployments import Deployment, Deployments, is_deployment_name
from runtime_service.gateway.fleet import Fleet
from runtime_service.gateway.runtime_link import RuntimeLink
from runtime_service.settings import quant_named
from shared import wire
from shared.engine import QuantConfig
from shared.errors import DeploymentNotFound, InvalidField, NoDeployments, RedisUnreachable
from shared.redis import reachable

MAX_REPLICAS = 1000
# Whether there is such a scheme is the compile daemon's to know.
_WRITTEN = re.compile(r"[a-z0-9_-]{1,64}")


class FleetService(fleet_pb2_grpc.FleetServiceServicer):
    """Serves `fleet` and its deployments to the network.

    Args:
        deployments: None where no Redis is configured.
    """

    def __init__(self, fleet: Fleet, deployments: Deployments | None, redis_url: str) -> None:
        self._fleet = fleet
        self._deployments = deployments
        self._redis_url = redis_url

    async def GetFleet(self, request: pb.GetFleetRequest, context: Any) -> pb.GetFleetResponse:
        """Every runtime and deployment."""
        links = sorted(self._fleet, key=lambda link: link.address)
        response = pb.GetFleetResponse(
            runtimes=[_runtime(link) for link in links], redis_answers=self._fleet.redis_answers
        )
        if self._deployments is not None and self._fleet.redis_answers:
            try:
                async with reachable(self._redis_url):
                    found = await self._deployments.list()
            except (RedisUnreachable, RedisError):
                response.redis_answers = False
            else:
                response.deployments.extend(map(self._described, found))
        return response

    async def ApplyDeployment(
        self, request: pb.ApplyDeploymentRequest, context: Any
    ) -> pb.ApplyDeploymentResponse:
        """Says what a deployment serves from now on."""
        wanted = _deployment_from(request.deployment)
        statuses = [link.status for link in self._fleet if link.status.deployment == wanted.name]
        last_version = max((status.deployment_version for status in statuses), default=0)
        async with reachable(self._redis_url):
            await self._written().apply(wanted, last_version)
            applied = await self._written().get(wanted.name)
        if applied is None:
            raise DeploymentNotFound(deployment=wanted.name)
        return pb.ApplyDeploymentResponse(deployment=self._described(applied))

    async def DeleteDeployment(
        self, request: pb.DeleteDeploymentRequest, context: Any
    ) -> pb.DeleteDeploymentResponse:
        """Has nobody serve a deployment."""
        async with reachable(self._redis_url):
            was_there = await self._written().delete(request.name)
        if not was_there:
            raise DeploymentNotFound(deployment=request.name)
        return pb.DeleteDeploymentResponse()

    def _written(self) -> Deployments:
        if self._deployments is None:
            raise NoDeployments()
        return self._deployments

    def _described(self, deployment: Deployment) -> pb.Deployment:
        ready = sum(
            link.is_usable
            and link.status.deployment == deployment.name
            and link.status.deployment_version == deployment.version
            for link in self._fleet
        )
        return pb.Deployment(
            name=deployment.name,
            model=deployment.model,
            quant=wire.quant_to_proto(deployment.quant),
            model_uri=deployment.model_uri,
            replicas=deployment.replicas,
            version=deployment.version,
            ready_replicas=ready,
        )


def _deployment_from(message: pb.Deployment) -> Deployment:
    """What `message` asks for.

    Raises:
        InvalidField: the first field that is wrong.
    """
    if not is_deployment_name(message.name):
        problem = "must be lowercase letters, digits and -, at most 63 characters"
        raise InvalidField(field="deployment.name", problem=f"{problem}, found {message.name!r}")
    if not message.model:
        raise InvalidField(field="deployment.model", problem="must be a model's name or digest")
    quant = _quant_from(message.quant)
    if not 1 <= message.replicas <= MAX_REPLICAS:
        problem = f"must be from 1 to {MAX_REPLICAS}, found {message.replicas}"
        raise InvalidField(field="deployment.replicas", problem=problem)
    return Deployment(
        message.name,
        message.model,
        quant,
        message.model_uri,
        message.replicas,
    )


def _quant_from(message: engine_pb2.QuantConfig) -> QuantConfig:
    """What engines are looked for by, which is all of a recipe that a deployment can say.

    Raises:
        InvalidField: it is something else, or more.
    """
    quant = wire.quant_from_proto(message)
    found_by = QuantConfig(quant.scheme, quant.group_size, kv_cache=quant.kv_cache)
    if quant != found_by:
        problem = "may have scheme, group_size and kv_cache; what else a build is to know goes to BuildEngine"
        raise InvalidField(field="deployment.quant", problem=problem)
    # Runtimes read it as it is written down.
    if not _is_quant(message.scheme, QuantConfig(message.scheme)):
        problem = f"must be a scheme, such as int8 or int4-awq, found {message.scheme!r}"
        raise InvalidField(field="deployment.quant.scheme", problem=problem)
    if not _is_quant(str(quant), quant):
        problem = f"must be fp8, int8 or empty, found {quant.kv_cache!r}"
        raise InvalidField(field="deployment.quant.kv_cache", problem=problem)
    return quant


def _is_quant(text: str, quant: QuantConfig) -> bool:
    """Claims that `text` says `quant`."""
    try:
        return _WRITTEN.fullmatch(text) is not None and quant_named(text) == quant
    except ValueError:  # of no form
        return False


def _runtime(link: RuntimeLink) -> pb.Runtime:
    status = link.status
    runtime = pb.Runtime(
        runtime_id=status.runtime_id,
        address=link.address,
        state=link.state,
        engine=status.engine.name,
        model=status.engine.model,
        quant=status.engine.key.quant,
        arch=status.engine.key.arch,
        deployment=status.deployment,
        deployment_version=status.deployment_version,
        load=status.load,
        num_blocks=status.limits.num_blocks,
        tokens_per_s=link.tokens_per_s,
        generations=link.num_runs,
        startup=status.startup,
    )
    if status.HasField("deployment_problem"):
        runtime.deployment_problem.CopyFrom(status.deployment_problem)
    runtime.silent_for.FromMilliseconds(round(link.silent_s * 1000))
    return runtime
