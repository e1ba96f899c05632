"""Builds and operations as protocol messages."""

from collections.abc import Sequence

from google.protobuf.timestamp_pb2 import Timestamp
from millrace.compiler.v1 import compiler_pb2

from compiler_service.build_record import BuildRecord
from compiler_service.operations import OperationRecord
from compiler_service.progress import BuildProgress
from shared.engine import EngineKey, EngineManifest
from shared.wire import key_to_proto

BuildView = BuildRecord | EngineManifest
"""A build: its record, or the engine where that was in the store already."""


def build_name(key: EngineKey) -> str:
    """Resource name of the build that makes the engine of `key`."""
    return f"builds/{key.digest}"


def build_to_proto(view: BuildView) -> compiler_pb2.Build:
    """`view` as it crosses the wire."""
    return _recorded(view) if isinstance(view, BuildRecord) else _cached(view)


def operation_to_proto(
    record: OperationRecord, builds: Sequence[BuildView]
) -> compiler_pb2.Operation:
    """`record` as it crosses the wire, with its builds as they stand."""
    return compiler_pb2.Operation(
        name=record.name,
        state=compiler_pb2.OperationState.Value(f"OPERATION_STATE_{record.state}"),
        builds=[build_to_proto(view) for view in builds],
        error=record.error,
        request=record.request,
    )


def _recorded(record: BuildRecord) -> compiler_pb2.Build:
    build = compiler_pb2.Build(
        name=build_name(record.job.key),
        key=key_to_proto(record.job.key),
        model_uri=record.job.model_uri,
        state=compiler_pb2.BuildState.Value(f"BUILD_STATE_{record.state}"),
        error=record.error,
        attempt=record.attempt,
        create_time=_timestamp(record.create_s),
        start_time=_timestamp(record.start_s),
        end_time=_timestamp(record.end_s),
    )
    if record.progress is not None:
        build.progress.CopyFrom(_progress_to_proto(record.progress))
    for stage, seconds in record.stage_timings:
        timing = build.stage_timings.add(stage=stage)
        timing.duration.FromMilliseconds(round(seconds * 1000))
    return build


def _cached(engine: EngineManifest) -> compiler_pb2.Build:
    time = _timestamp(engine.created_s)
    return compiler_pb2.Build(
        name=build_name(engine.key),
        key=key_to_proto(engine.key),
        state=compiler_pb2.BUILD_STATE_SUCCEEDED,
        cached=True,
        create_time=time,
        end_time=time,
    )


def _progress_to_proto(progress: BuildProgress) -> compiler_pb2.Progress:
    message = compiler_pb2.Progress(
        stage=progress.stage,
        fraction=progress.fraction,
        done_bytes=progress.done_bytes,
        total_bytes=progress.total_bytes,
    )
    if progress.eta_s is not None:
        message.eta.FromMilliseconds(round(progress.eta_s * 1000))
    return message


def _timestamp(seconds: float | None) -> Timestamp | None:
    if seconds is None:
        return None
    time = Timestamp()
    time.FromMilliseconds(round(seconds * 1000))
    return time
