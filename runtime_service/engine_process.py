"""The process that owns the device: it loads an engine, says `Ready`, and runs the loop.

The front starts it with `start_engine_process`, as an `EngineInterpreter` that is told what to load.
"""

import asyncio
import faulthandler
import gc
import importlib
import pickle
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import structlog

from runtime_service.device_full import device_full
from runtime_service.engine_core import EngineCore, LoadedEngine, OnPhase
from runtime_service.engine_interpreter import EngineInterpreter
from runtime_service.engine_messages import Failed, Loading, Ready
from runtime_service.engine_transport import EngineSide, FrontSide, PeerGone
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
            import what the engine process imports. It calls its argument `on_phase` with the name of each
            phase that begins.
        arguments: the function's others, by name; pickled.
        engine: its name, for people.
        overlap: see `EngineCore`.
    """

    loader: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    engine: str = "the engine"
    overlap: bool = True
    log_level: str = "info"
    log_format: LogFormat = "auto"


class EngineProcess:
    """A running engine process, as the front holds it: `link` speaks to it."""

    def __init__(self, process: subprocess.Popen[bytes], link: FrontSide) -> None:
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
        self._process.kill()
        return await self.wait()

    async def wait(self) -> int:
        """The exit status of a process that ends by itself, negative for a signal."""
        return await asyncio.to_thread(self._process.wait)


async def start_engine_process(
    spec: EngineSpec, waiting: EngineInterpreter | None = None
) -> EngineProcess:
    """A process that loads what `spec` says; its first reply after `Loading` is `Ready` or `Failed`.

    Call it from the main thread, as `EngineInterpreter` has to be.

    Args:
        waiting: becomes that process, unless it has been one already.
    """
    if waiting is None or not waiting.take():
        waiting = EngineInterpreter()
    try:
        link = await FrontSide.open(waiting.front)
    except BaseException:
        waiting.end()
        raise
    link.send_bytes(pickle.dumps(spec))
    return EngineProcess(waiting.process, link)


def main(arguments: list[str]) -> int:
    """The engine process.

    Args:
        arguments: the socket's descriptor, the front's pid, and what `EngineInterpreter` calls `ahead`.
    """
    end_with_parent(int(arguments[1]), signal.SIGKILL)
    # Of a crash in native code the daemon knows the signal alone: its log gets every thread's stack.
    faulthandler.enable()
    mailbox = EngineSide(socket.socket(fileno=int(arguments[0])))
    share_openmp()
    if arguments[2]:
        # In a thread: a spec that arrives meanwhile has its weights hashed beside it.
        threading.Thread(target=_function_named(arguments[2])).start()
    try:
        spec = pickle.loads(mailbox.receive_bytes())
        configure_logging(spec.log_level, spec.log_format, "engine")
        return _serve(spec, mailbox)
    except PeerGone:
        return 1


def _serve(spec: EngineSpec, mailbox: EngineSide) -> int:
    try:
        with device_full(spec.engine):
            _run(spec, mailbox)
    except PeerGone:
        raise
    except MillraceError as error:
        _log.error("engine_failed", reason=error.reason, problem=str(error))
        mailbox.send_last(Failed(to_status(error).SerializeToString()))
        return 1
    except Exception:
        _log.exception("engine_failed_unforeseen")
        mailbox.send_last(Failed(to_status(Internal()).SerializeToString()))
        return 1
    return 0


def _run(spec: EngineSpec, mailbox: EngineSide) -> None:
    loaded, ready = _load(spec, lambda phase: mailbox.send(Loading(phase)))
    core = EngineCore(Scheduler(loaded.limits), loaded.runner, mailbox, spec.overlap)
    # What was loaded stays: the collector need not walk it between steps.
    gc.collect()
    gc.freeze()
    mailbox.send(ready)
    core.run()


def _function_named(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


def _load(spec: EngineSpec, on_phase: OnPhase) -> tuple[LoadedEngine, Ready]:
    started = time.monotonic()
    on_phase("import")
    load = _function_named(spec.loader)
    imported = time.monotonic()
    loaded: LoadedEngine = load(**spec.arguments, on_phase=on_phase)
    warm_up_started = time.monotonic()
    on_phase("warm_up")
    loaded.runner.warm_up()
    phases = (
        ("import", imported - started),
        *loaded.phases,
        ("warm_up", time.monotonic() - warm_up_started),
    )
    return loaded, Ready(loaded.limits, phases)
