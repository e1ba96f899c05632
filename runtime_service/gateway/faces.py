"""What a gateway serves, put together: its services on the gRPC server, and the HTTP server."""

from millrace.fleet.v1 import fleet_pb2_grpc
from millrace.kserve.v2 import inference_pb2_grpc
from millrace.runtime.v1 import runtime_pb2_grpc

from runtime_service.gateway.fleet import Fleet
from runtime_service.gateway.fleet_service import FleetService
from runtime_service.gateway.gateway import Gateway
from runtime_service.gateway.http.openai import OpenAiApi
from runtime_service.gateway.http.page import Builds, Page
from runtime_service.gateway.http.server import Route
from runtime_service.gateway.kserve.service import InferenceService
from runtime_service.gateway.service import GatewayRuntimeService
from shared.server import DaemonServer

# Those that `add_services` adds, for health and reflection.
SERVICES = (
    "millrace.runtime.v1.RuntimeService",
    "millrace.fleet.v1.FleetService",
    "inference.GRPCInferenceService",
)


def add_services(
    server: DaemonServer, gateway: Gateway, fleet: Fleet, fleet_service: FleetService
) -> None:
    """Has `server`, which is not started yet, serve all of `SERVICES`."""
    runtime_pb2_grpc.add_RuntimeServiceServicer_to_server(
        GatewayRuntimeService(gateway, fleet), server.grpc
    )
    fleet_pb2_grpc.add_FleetServiceServicer_to_server(fleet_service, server.grpc)
    inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(
        InferenceService(gateway, fleet), server.grpc
    )


def http_routes(
    gateway: Gateway, fleet: Fleet, fleet_service: FleetService, builds: Builds | None
) -> tuple[Route, ...]:
    """All that a gateway answers over HTTP.

    Args:
        builds: None where no compile daemon is known.
    """
    return (
        *OpenAiApi(gateway, fleet).routes(),
        *Page(gateway, fleet_service, builds).routes(),
    )
