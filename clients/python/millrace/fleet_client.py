"""The blocking client of a gateway's fleet: who serves what, and what is to be served."""

from typing import Self

import grpc

from millrace.channels import DEFAULT_GATEWAY, Security, open_channel
from millrace.engine.v1 import engine_pb2
from millrace.errors import filled, from_rpc_error
from millrace.fleet.v1 import fleet_pb2, fleet_pb2_grpc

_START = "millrace up --runtimes 2 --gateway {address}"


class FleetClient:
    """The fleet behind the gateway at `gateway`; connects when it is used.

    Every method raises MillraceError where the gateway refuses or does not answer.

    Args:
        api_key, tls_ca, tls_cert, tls_key: as `Security`.
    Raises:
        ValueError: as `Security`; or the API key would cross a network in plaintext.
    """

    def __init__(
        self,
        gateway: str = DEFAULT_GATEWAY,
        *,
        timeout_s: float = 30.0,
        api_key: str = "",
        tls_ca: str = "",
        tls_cert: str = "",
        tls_key: str = "",
    ) -> None:
        self._address = gateway
        self._timeout_s = timeout_s
        self._channel = open_channel(gateway, Security(api_key, tls_ca, tls_cert, tls_key))
        self._stub = fleet_pb2_grpc.FleetServiceStub(self._channel)

    def close(self) -> None:
        """Closes the connection."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get_fleet(self) -> fleet_pb2.GetFleetResponse:
        """Every runtime and deployment."""
        try:
            return self._stub.GetFleet(fleet_pb2.GetFleetRequest(), timeout=self._timeout_s)
        except grpc.RpcError as raised:
            raise from_rpc_error(raised, self._address, _START) from None

    def deploy(
        self,
        name: str,
        model: str,
        scheme: str,
        group_size: int,
        model_uri: str,
        replicas: int,
        kv_cache: str = "",
    ) -> fleet_pb2.Deployment:
        """Says what the deployment `name` serves from now on; returns at once."""
        deployment = filled(
            fleet_pb2.Deployment,
            name=name,
            model=model,
            quant=filled(
                engine_pb2.QuantConfig, scheme=scheme, group_size=group_size, kv_cache=kv_cache
            ),
            model_uri=model_uri,
            replicas=replicas,
        )
        request = fleet_pb2.ApplyDeploymentRequest(deployment=deployment)
        try:
            return self._stub.ApplyDeployment(request, timeout=self._timeout_s).deployment
        except grpc.RpcError as raised:
            raise from_rpc_error(raised, self._address, _START) from None

    def undeploy(self, name: str) -> None:
        """Has nobody serve the deployment `name`; what runs is finished."""
        request = fleet_pb2.DeleteDeploymentRequest(name=name)
        try:
            self._stub.DeleteDeployment(request, timeout=self._timeout_s)
        except grpc.RpcError as raised:
            raise from_rpc_error(raised, self._address, _START) from None
