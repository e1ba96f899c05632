"""The process that owns the device: it loads an engine, says `Ready`, and runs the loop.

The front starts it with `start_engine_process`: a fresh interpreter (nothing of the front's threads
or gRPC state is inherited) in its own session, so that a terminal's Ctrl-C reaches the front alone.
It dies with the front: the kernel kills it, and its socket closes.
"""

import asyncio
import contextlib
import gc
import importlib
import os
import pickle
import signal
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import structlog

from runtime_service.engine_core import EngineCore, LoadedEngine
from runtime_service.engine_messages import Failed, Ready
from runtime_service.engine_transport import EngineSide, FrontSide, PeerGone, socket_pair
from runtime_service.scheduling.scheduler import Scheduler
from shared.errors import Internal, MillraceError, to_status
from shared.log import LogFormat, configure_logging
from shared.process import end_with_parent, share_openmp

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What an engine process is to run.

    Args:
        loader: `module:function` that gives a `LoadedEngine`; a name, so that the front need not
            import what the engine process imports.
        arguments: the function's, by name; pickled.
        overlap: see `EngineCore`.
    """

    loader: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    overlap: bool = True
    log_level: str = "info"
    log_format: LogFormat = "auto"


class EngineProcess:
    """A running engine process, as the front holds it: `link` speaks to it."""

    def __init__(self, process: asyncio.subprocess.Process, link: FrontSide) -> None:
        self._process = process
        self.link = link

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    async def stop(self) -> int:
        """Kills the process if it still runs, and reaps it; its exit status, negative for a signal.

        Nothing that it holds needs a goodbye: send `Shutdown` first for a clean exit status.
        """
        self.link.close()
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            self._process.kill()
        return await self._process.wait()

    async def wait(self) -> int:
        """The exit status of a process that ends by itself, negative for a signal."""
        return await self._process.wait()


async def start_engine_process(spec: EngineSpec) -> EngineProcess:
    """A process that loads what `spec` says; its first reply is `Ready` or `Failed`.

    Call it from the main thread: the kernel ties the child's life to the thread that started it.
    """
    front, engine = socket_pair()
    try:
        with engine:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", __name__, str(engine.fileno()), str(os.getpid())),
                pass_fds=[engine.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                start_new_session=True,
            )
    except BaseException:
        front.close()
        raise
    link = await FrontSide.open(front)
    link.send_bytes(pickle.dumps(spec))
    return EngineProcess(process, link)


def main(arguments: list[str]) -> int:
    """The engine process: `arguments` are the socket's descriptor and the front's pid."""
    end_with_parent(int(arguments[1]), signal.SIGKILL)
    mailbox = EngineSide(socket.socket(fileno=int(arguments[0])))
    try:
        spec = pickle.loads(mailbox.receive_bytes())
        configure_logging(spec.log_level, spec.log_format, "engine")
        return _serve(spec, mailbox)
    except PeerGone:
        return 1


def _serve(spec: EngineSpec, mailbox: EngineSide) -> int:
    try:
        loaded, ready = _load(spec)
        scheduler = Scheduler(loaded.limits)
        core = EngineCore(scheduler, loaded.runner, mailbox, spec.overlap)
        # What was loaded stays: the collector need not walk it between steps.
        gc.collect()
        gc.freeze()
        mailbox.send(ready)
        core.run()
    except PeerGone:
        raise
    except MillraceError as error:
        _log.error("engine_failed", reason=error.reason, problem=str(error))
        mailbox.send(Failed(to_status(error).SerializeToString()))
        return 1
    except Exception:
        _log.exception("engine_failed_unforeseen")
        mailbox.send(Failed(to_status(Internal()).SerializeToString()))
        return 1
    return 0


def _load(spec: EngineSpec) -> tuple[LoadedEngine, Ready]:
    started = time.monotonic()
    share_openmp()
    module, _, function = spec.loader.partition(":")
    load = getattr(importlib.import_module(module), function)
    imported = time.monotonic()
    loaded: LoadedEngine = load(**spec.arguments)
    warm_up_started = time.monotonic()
    loaded.runner.warm_up()
    phases = (
        ("import", imported - started),
        *loaded.phases,
        ("warm_up", time.monotonic() - warm_up_started),
    )
    return loaded, Ready(loaded.limits, phases)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
