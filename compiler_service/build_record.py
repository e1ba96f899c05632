"""A build: what is to be made, and how far it is; as Redis keeps it, in the hash `build:{digest}`.

`build_queue.py` says what changes it, and when.
"""

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass

from google.protobuf.message import DecodeError
from google.rpc import status_pb2

from compiler_service.progress import BuildProgress
from shared.engine import EngineKey

QUEUED, RUNNING = "QUEUED", "RUNNING"
SUCCEEDED, FAILED, CANCELLED = "SUCCEEDED", "FAILED", "CANCELLED"


def record_key(digest: str) -> str:
    """Where the record of a build is."""
    return f"build:{digest}"


def events_key(digest: str) -> str:
    """Where the changes of a build are told."""
    return f"build:{digest}:events"


@dataclass(frozen=True, slots=True)
class BuildJob:
    """What to build, from where.

    Args:
        calibration_uri: empty for the text that the daemon brings.
        traceparent: of the call that first asked for it, where that is traced.
    """

    model_uri: str
    model: str
    key: EngineKey
    calibration_uri: str = ""
    traceparent: str = ""

    def to_json(self) -> str:
        """As it is kept."""
        return json.dumps(
            {
                "model_uri": self.model_uri,
                "model": self.model,
                "key": self.key.to_dict(),
                "calibration_uri": self.calibration_uri,
                "traceparent": self.traceparent,
            }
        )

    @staticmethod
    def from_json(text: str) -> "BuildJob":
        """The job that `to_json` wrote."""
        raw = json.loads(text)
        key = EngineKey.from_dict(raw["key"])
        more = (raw.get(name, "") for name in ("calibration_uri", "traceparent"))
        return BuildJob(raw["model_uri"], raw["model"], key, *more)


@dataclass(frozen=True, slots=True)
class BuildRecord:
    """A build as it stands. Times are Unix seconds, None where the moment has not come."""

    job: BuildJob
    state: str
    attempt: int
    create_s: float
    start_s: float | None
    end_s: float | None
    progress: BuildProgress | None
    error: status_pb2.Status | None
    stage_timings: tuple[tuple[str, float], ...]

    @property
    def is_ended(self) -> bool:
        """Claims that nothing will change any more, unless the build is asked for again."""
        return self.state in (SUCCEEDED, FAILED, CANCELLED)


def progress_fields(progress: BuildProgress | None) -> list[object]:
    """Fields of the hash that tell progress, name and value in turn; `read_record` reads them."""
    if progress is None:
        return []
    return [
        "stage", progress.stage,
        "fraction", progress.fraction,
        "done_bytes", progress.done_bytes,
        "total_bytes", progress.total_bytes,
        "eta_s", "" if progress.eta_s is None else progress.eta_s,
    ]  # fmt: skip


def read_record(_: str, raw: Mapping[str, str]) -> BuildRecord:
    """The build that a hash in Redis holds, as `shared.redis.Records` reads them: (key, hash)."""
    progress = None
    if raw["state"] == RUNNING and "stage" in raw:
        progress = BuildProgress(
            raw["stage"],
            float(raw["fraction"]),
            int(raw["done_bytes"]),
            int(raw["total_bytes"]),
            float(raw["eta_s"]) if raw["eta_s"] else None,
        )
    error = None
    if "error" in raw:
        error = _status(raw["error"])
    timings = json.loads(raw.get("stage_timings", "[]"))
    return BuildRecord(
        job=BuildJob.from_json(raw["job"]),
        state=raw["state"],
        attempt=int(raw["attempt"]),
        create_s=int(raw["create_ms"]) / 1000,
        start_s=_seconds(raw.get("start_ms")),
        end_s=_seconds(raw.get("end_ms")),
        progress=progress,
        error=error,
        stage_timings=tuple((stage, seconds) for stage, seconds in timings),
    )


def _status(text: str) -> status_pb2.Status:
    try:
        return status_pb2.Status.FromString(base64.b64decode(text))
    except DecodeError as error:
        raise ValueError("its error is no status") from error


def _seconds(milliseconds: str | None) -> float | None:
    return None if milliseconds is None else int(milliseconds) / 1000
