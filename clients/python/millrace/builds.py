"""What the SDK knows about builds; pure."""

from collections.abc import Iterable, Sequence

from millrace.compiler.v1 import compiler_pb2 as pb
from millrace.engine.v1 import engine_pb2
from millrace.errors import build_cancelled, from_status

TERMINAL_STATES = frozenset(
    {pb.BUILD_STATE_SUCCEEDED, pb.BUILD_STATE_FAILED, pb.BUILD_STATE_CANCELLED}
)


def build_request(
    model_uri: str, archs: Sequence[str], quant: str, group_size: int, model: str
) -> pb.BuildEngineRequest:
    """The wire form of what is asked; an empty `quant` leaves the checkpoint's own format."""
    request = pb.BuildEngineRequest(model_uri=model_uri, archs=archs, model=model)
    if quant:
        request.quant.CopyFrom(engine_pb2.QuantConfig(scheme=quant, group_size=group_size))
    return request


def has_ended(operation: pb.Operation) -> bool:
    """Claims that nothing of `operation` will change any more."""
    if operation.state == pb.OPERATION_STATE_RESOLVED:
        return all(build.state in TERMINAL_STATES for build in operation.builds)
    return operation.state == pb.OPERATION_STATE_FAILED


def raise_if_failed(operation: pb.Operation) -> None:
    """Raises MillraceError where the operation, or the first of its builds, failed."""
    if operation.state == pb.OPERATION_STATE_FAILED:
        raise from_status(operation.error)
    for build in operation.builds:
        raise_if_build_failed(build)


def raise_if_build_failed(build: pb.Build) -> None:
    """Raises MillraceError where `build` failed or was cancelled."""
    if build.state == pb.BUILD_STATE_FAILED:
        raise from_status(build.error)
    if build.state == pb.BUILD_STATE_CANCELLED:
        raise build_cancelled(build.name)


def engine_names(builds: Iterable[pb.Build]) -> list[str]:
    """Resource names of the engines that `builds` make."""
    return [build.name.replace("builds/", "engines/", 1) for build in builds]
