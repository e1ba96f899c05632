"""One build in a process of its own: `python -m compiler_service.build_child`.

A crash or running out of memory kills this process alone. It reads one job, a line of JSON, from
stdin, and writes lines of JSON to stdout; stderr is its log.

    in    {"model_uri", "model", "key": {...}, "store": URL, "cache_dir": folder, "calibration_uri",
           "local": folder, "local_bytes"}; the last two for a store elsewhere: where it is built
    out   {"stage", "fraction", "done_bytes", "total_bytes"}               any number
    out   {"engine": name}  or  {"error": base64 of a google.rpc.Status}   last, exactly one

SIGTERM cancels: it ends with exit status 143, and no line follows. It dies with its parent.
"""

import base64
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import structlog

from compiler_service.progress import BuildProgress
from shared.process import end_with_parent, share_openmp

share_openmp()  # torch comes with what follows
from compiler_service.builder import (  # noqa: E402
    BuildCancelled,
    BuildRequest,
    IsCancelled,
    Report,
    build,
)
from shared.engine import EngineKey, EngineManifest  # noqa: E402
from shared.errors import Internal, MillraceError, to_status  # noqa: E402
from shared.log import configure_logging  # noqa: E402
from shared.store import LocalStore, open_store  # noqa: E402
from shared.store.cache import EngineCache  # noqa: E402

CANCELLED_STATUS = 128 + signal.SIGTERM
MIN_REPORT_INTERVAL_S = 0.1

log = structlog.get_logger()


def main() -> int:
    """Builds what stdin asks for; the exit status: 0 built, 1 failed, 143 cancelled."""
    end_with_parent(os.getppid(), signal.SIGKILL)
    # Results have stdout to themselves: libraries that print do so into the log.
    results = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    configure_logging("info", "json", "build")
    cancelled = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: cancelled.set())
    job = json.loads(sys.stdin.readline())
    try:
        return _build(job, results, cancelled.is_set)
    except MillraceError as error:
        log.warning("build_failed", reason=error.reason, message=str(error))
        _send(results, error=_encoded(error))
    except BuildCancelled:
        log.info("build_cancelled")
        return CANCELLED_STATUS
    except Exception:
        log.exception("build_crashed")
        _send(results, error=_encoded(Internal()))
    return 1


def _build(job: dict[str, Any], results: IO[str], is_cancelled: Callable[[], bool]) -> int:
    request = BuildRequest(
        job["model_uri"],
        EngineKey.from_dict(job["key"]),
        job["model"],
        Path(job["cache_dir"]),
        job.get("calibration_uri", ""),
    )
    started_s, stages = time.monotonic(), dict[str, float]()
    last_stage, last_s = "", 0.0

    def report(progress: BuildProgress) -> None:
        nonlocal last_stage, last_s
        now = time.monotonic()
        stages.setdefault(progress.stage, round(now - started_s, 3))
        if progress.stage != last_stage or now - last_s >= MIN_REPORT_INTERVAL_S:
            last_stage, last_s = progress.stage, now
            _send(
                results,
                stage=progress.stage,
                fraction=progress.fraction,
                done_bytes=progress.done_bytes,
                total_bytes=progress.total_bytes,
            )

    engine = _built(job, request, report, is_cancelled)
    log.info(
        "build_succeeded",
        engine=engine.name,
        duration_s=round(time.monotonic() - started_s, 3),
        stage_starts_s=stages,
    )
    _send(results, engine=engine.name)
    return 0


def _built(
    job: dict[str, Any], request: BuildRequest, report: Report, is_cancelled: IsCancelled
) -> EngineManifest:
    store = open_store(job["store"])
    if isinstance(store, LocalStore):
        return build(request, store, report, is_cancelled)
    from compiler_service.remote_build import build_into
    from shared.store.registry_store import RegistryStore

    assert isinstance(store, RegistryStore), "a compile daemon writes to its store"
    cache = EngineCache(LocalStore(job["local"]), job["local_bytes"])
    return build_into(store, cache, request, report, is_cancelled)


def _send(results: IO[str], **message: object) -> None:
    results.write(json.dumps(message) + "\n")


def _encoded(error: MillraceError) -> str:
    return base64.b64encode(to_status(error).SerializeToString()).decode()


if __name__ == "__main__":
    sys.exit(main())
