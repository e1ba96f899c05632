"""Which engine this daemon serves, and the way of every start to it.

One engine at a time: loaded, swapped without losing what runs, restarted when its process is lost,
drained at the end. Starts are passed on, held or refused according to that. Knows no gRPC.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import structlog
from millrace.runtime.v1 import runtime_pb2 as pb

from runtime_service.deployment import EngineSource
from runtime_service.engine_client import EngineClient
from runtime_service.generation import Generation
from runtime_service.generation_call import GenerationCall
from runtime_service.metrics import RuntimeMetrics
from runtime_service.served_engine import EngineText, ServedEngine
from shared.engine import EngineManifest, EngineSelector
from shared.errors import (
    ArchMismatch,
    BlobNotFound,
    DigestMismatch,
    Draining,
    EngineLost,
    Internal,
    MillraceError,
    NoEngine,
)

# Starts that may wait for an engine swap; tokenizing threads.
MAX_HELD_STARTS = 4096
_NUM_TEXT_THREADS = 2
_FIRST_RETRY_S, _LAST_RETRY_S = 0.2, 30.0

OnLost = Callable[[EngineClient, MillraceError], None]

_log = structlog.get_logger()


class Runtime:
    """Serves one engine at a time.

    Args:
        arch: of the engines that this machine runs.
        source: where engines come from.
        read_text: reads an engine's text side; blocks.
        start_client: starts a process for an engine; gives its client once it is loaded.
        on_change: called when what `state` and `is_serving` say may have changed.
    """

    def __init__(
        self,
        arch: str,
        source: EngineSource,
        read_text: Callable[[EngineManifest], EngineText],
        start_client: Callable[[EngineManifest, OnLost], Awaitable[EngineClient]],
        metrics: RuntimeMetrics,
        on_change: Callable[[], None],
    ) -> None:
        self.arch = arch
        self.metrics = metrics
        self.served: ServedEngine | None = None
        self.startup: tuple[tuple[str, float], ...] = ()
        self._state = pb.RUNTIME_STATE_IDLE
        self._source = source
        self._read_text = read_text
        self._start_client = start_client
        self._on_change = on_change
        self._refusal: MillraceError = NoEngine()
        self._calls: set[GenerationCall] = set()
        self._text_threads = ThreadPoolExecutor(_NUM_TEXT_THREADS, "text")
        self._tasks: set[asyncio.Task[Any]] = set()
        # Held while the engine is exchanged, by whoever does it.
        self._exchange = asyncio.Lock()
        self._is_holding = False
        self._released = asyncio.Event()
        self._num_held = 0

    @property
    def state(self) -> pb.RuntimeState.ValueType:
        """Where the daemon stands."""
        return self._state

    @property
    def is_serving(self) -> bool:
        """Claims that starts are welcome, even if they wait for a swap."""
        return self._state == pb.RUNTIME_STATE_SERVING or self._is_holding

    # Calls and starts.

    def open_call(self, cache_salt: str) -> GenerationCall:
        """A call whose generations run here; give it back with `close_call`."""
        call = GenerationCall(self, self.metrics, cache_salt)
        self._calls.add(call)
        if self._state == pb.RUNTIME_STATE_DRAINING:
            call.drain()
        return call

    def close_call(self, call: GenerationCall) -> None:
        """Ends what still runs on `call`: nobody reads it."""
        self._calls.discard(call)
        call.close()

    def start(self, generation: Generation, start: pb.StartGeneration, cache_salt: str) -> None:
        """Sees to it that `generation` runs, or ends it with an error; never raises."""
        try:
            served = self._served_now()
            if served is not None and start.WhichOneof("prompt") in ("token_ids", None):
                parsed = served.parse(start)
                served.submit(generation, parsed, served.encode(start), cache_salt)
                return
        except MillraceError as error:
            generation.fail(error)
            return
        task = self._run(self._prepare(generation, start, cache_salt))
        task.add_done_callback(lambda done: _end_if_failed(generation, done))

    async def _prepare(
        self, generation: Generation, start: pb.StartGeneration, cache_salt: str
    ) -> None:
        """The way of a start that has to wait: for a swap, or for its text to become tokens."""
        loop = asyncio.get_running_loop()
        try:
            while not generation.is_ended:
                served = await self._served_soon()
                parsed = served.parse(start)
                token_ids = await loop.run_in_executor(self._text_threads, served.encode, start)
                if self.served is served and not self._is_holding and not generation.is_ended:
                    served.submit(generation, parsed, token_ids, cache_salt)
                    return
        except MillraceError as error:
            generation.fail(error)

    def _served_now(self) -> ServedEngine | None:
        """The engine that takes starts now; None while they are held.

        Raises:
            Draining, NoEngine, EngineLost: none does, and none will soon.
        """
        if self._state == pb.RUNTIME_STATE_DRAINING:
            raise Draining()
        if self._is_holding:
            return None
        if self.served is None:
            raise self._refusal
        return self.served

    async def _served_soon(self) -> ServedEngine:
        while (served := self._served_now()) is None:
            if self._num_held >= MAX_HELD_STARTS:
                raise NoEngine()
            self._num_held += 1
            try:
                await self._released.wait()
            finally:
                self._num_held -= 1
        return served

    # Engines.

    async def load(self, selector: EngineSelector, model_uri: str) -> EngineManifest:
        """Serves the newest engine that fits, from now on; what runs finishes first.

        Args:
            model_uri: where the checkpoint is, in case it has to be built; "" = do not build.
        Raises:
            ArchMismatch: this machine does not run engines of that arch.
            Draining: the daemon is stopping.
            MillraceError: it cannot be found, built, pulled or loaded; what was served before is
                served again.
        """
        if selector.arch != self.arch:
            command = f"millrace-runtime --arch {selector.arch}"
            raise ArchMismatch(built_for=selector.arch, found=self.arch, command=command)
        started = time.monotonic()
        if self.served is None:
            self._become(pb.RUNTIME_STATE_LOADING)
        try:
            engine = await self._source.find(selector, model_uri, self._on_build)
            found = ("find_engine", time.monotonic() - started)
            async with self._exchange:
                await self._exchange_for(engine, found)
        finally:
            # An engine that was lost is still being restarted; else there is none.
            if self.served is None and isinstance(self._refusal, NoEngine):
                self._become(pb.RUNTIME_STATE_IDLE)
        return engine

    async def unload(self) -> None:
        """Finishes what runs and releases the engine; starts are refused from now on."""
        async with self._exchange:
            served, self.served = self.served, None
            self._refusal = NoEngine()
            self._become(pb.RUNTIME_STATE_IDLE)
            if served is not None:
                await _to_the_end(self._run(_release(served.client)))

    async def drain(self, grace_s: float) -> None:
        """Takes nothing new, lets what runs finish, and ends what is left with DRAINING."""
        self._become(pb.RUNTIME_STATE_DRAINING)
        self._released.set()
        for call in self._calls:
            call.drain()
        served = self.served
        if served is not None:
            try:
                async with asyncio.timeout(grace_s):
                    await served.client.wait_idle()
            except TimeoutError:
                _log.warning("drain_grace_ended", calls=len(self._calls))
        for call in list(self._calls):
            call.fail_all(Draining())

    async def close(self) -> None:
        """Ends the engine process and everything else that this runtime started."""
        self._state = pb.RUNTIME_STATE_DRAINING
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        served, self.served = self.served, None
        if served is not None:
            await served.client.stop()
        self._text_threads.shutdown(wait=False)

    async def _exchange_for(self, engine: EngineManifest, found: tuple[str, float]) -> None:
        with self._holding():
            old = self.served
            if old is not None:
                await old.client.wait_idle()
            # From here on there is no way back but loading: a caller that gives up changes nothing.
            await _to_the_end(self._run(self._replace(old, engine, found)))

    async def _replace(
        self, old: ServedEngine | None, engine: EngineManifest, found: tuple[str, float]
    ) -> None:
        self.served = None
        if old is not None:
            await old.client.stop()
        try:
            await self._bring_up(engine, found)
        finally:
            if self.served is None and old is not None:
                _log.warning("engine_swap_failed", wanted=engine.name, restored=old.engine.name)
                await self._restore(old.engine)

    async def _restore(self, engine: EngineManifest) -> None:
        try:
            await self._bring_up(engine, ("find_engine", 0.0))
        except MillraceError as error:
            self._refusal = EngineLost(problem=str(error).rstrip("."))
            self._run(self._restart(engine))

    async def _bring_up(self, engine: EngineManifest, found: tuple[str, float]) -> None:
        if self._state == pb.RUNTIME_STATE_DRAINING:
            raise Draining()
        self._become(pb.RUNTIME_STATE_LOADING)
        started = time.monotonic()
        try:
            served = await self._start(engine)
        except (DigestMismatch, BlobNotFound):
            if not await self._source.repair(engine):
                raise
            served = await self._start(engine)
        if served.client.is_over:
            raise EngineLost(problem="it ended right after it was loaded")
        phases = served.client.phases
        rest = time.monotonic() - started - sum(seconds for _, seconds in phases)
        self.startup = (found, ("start_process", max(rest, 0.0)), *phases)
        self.served = served
        self._become(pb.RUNTIME_STATE_SERVING)
        limits = served.client.limits
        _log.info(
            "engine_loaded",
            engine=engine.name,
            model=engine.model,
            **{f"{name}_s": round(seconds, 3) for name, seconds in self.startup},
            max_sequence_tokens=limits.max_sequence_tokens,
            max_sequences=limits.max_sequences,
            kv_blocks=limits.num_blocks,
            kv_reason=limits.kv_reason,
        )

    async def _start(self, engine: EngineManifest) -> ServedEngine:
        """The engine's process and text side, made at the same time."""
        starting = asyncio.ensure_future(self._start_client(engine, self._on_engine_lost))
        try:
            text = await asyncio.to_thread(self._read_text, engine)
            return ServedEngine(engine, text, await starting)
        except BaseException:
            starting.cancel()
            await asyncio.wait({starting})
            if not starting.cancelled() and starting.exception() is None:
                await starting.result().stop()
            raise

    def _on_engine_lost(self, client: EngineClient, error: MillraceError) -> None:
        served = self.served
        if served is None or served.client is not client:
            return  # lost while it was being exchanged: whoever does that goes on
        self.served = None
        self._refusal = error
        self.metrics.engine_restarts += 1
        self._become(pb.RUNTIME_STATE_LOADING)
        self._run(self._restart(served.engine))

    async def _restart(self, engine: EngineManifest) -> None:
        async with self._exchange:
            if self.served is None and isinstance(self._refusal, EngineLost):
                await self._keep_bringing_up(engine)

    async def _keep_bringing_up(self, engine: EngineManifest) -> None:
        """Loads an engine that was served before, for as long as it takes."""
        delay_s = _FIRST_RETRY_S
        while self.served is None and self._state != pb.RUNTIME_STATE_DRAINING:
            try:
                await self._bring_up(engine, ("find_engine", 0.0))
            except MillraceError as error:
                self._refusal = EngineLost(problem=str(error).rstrip("."), retry_after_s=delay_s)
                _log.error("engine_restart_failed", reason=error.reason, problem=str(error))
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, _LAST_RETRY_S)

    @contextmanager
    def _holding(self) -> Iterator[None]:
        """While an engine is served and exchanged, starts wait instead of being refused."""
        self._is_holding = self.served is not None
        self._released.clear()
        try:
            yield
        finally:
            self._is_holding = False
            self._released.set()
            self._on_change()

    def _on_build(self) -> None:
        if self.served is None:
            self._become(pb.RUNTIME_STATE_BUILDING)

    def _become(self, state: pb.RuntimeState.ValueType) -> None:
        if self._state != pb.RUNTIME_STATE_DRAINING:
            self._state = state
            self._on_change()

    def _run(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _release(client: EngineClient) -> None:
    try:
        await client.wait_idle()
    finally:
        await client.stop()


async def _to_the_end(task: asyncio.Task[None]) -> None:
    """Waits for `task` even where the caller is cancelled meanwhile; it is cancelled afterwards."""
    was_cancelled = False
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            was_cancelled = True
    if was_cancelled:
        raise asyncio.CancelledError
    task.result()


def _end_if_failed(generation: Generation, task: asyncio.Task[None]) -> None:
    """A start whose way failed unforeseen still ends with one event."""
    if task.cancelled():
        generation.fail(Draining())
    elif (error := task.exception()) is not None:
        _log.error("start_failed_unforeseen", exc_info=error)
        generation.fail(Internal())
