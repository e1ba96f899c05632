"""Which engine this daemon serves, and the way of every start to it.

One engine at a time: loaded, swapped without losing what runs, restarted when its process is lost,
drained at the end. Starts are passed on, held or refused according to that. Knows no gRPC.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import structlog
from millrace.runtime.v1 import runtime_pb2 as pb

from runtime_service.engine_client import EngineClient
from runtime_service.engine_core import OnPhase
from runtime_service.engine_source import EngineSource
from runtime_service.generation import Generation
from runtime_service.generation_call import GenerationCall, OnMember
from runtime_service.generation_trace import trace_generation
from runtime_service.metrics import RuntimeMetrics
from runtime_service.served_engine import EngineText, ServedEngine
from runtime_service.startup import Startup
from shared.auth import ANYBODY, Principal
from shared.background import Background
from shared.engine import EngineManifest, EngineSelector
from shared.errors import (
    ArchMismatch,
    BlobNotFound,
    DigestMismatch,
    Draining,
    EngineLost,
    EngineNotFound,
    GenerationNotFound,
    Internal,
    MillraceError,
    ModelNotServed,
    NoEngine,
    QueueFull,
)
from shared.quotas import GenerationQuota

# Of starts that wait for a swap or for their tokens: a byte of a start counts as a token, which it
# is at most, and a start as at least some. Threads that tokenize.
MAX_PREPARED_TOKENS = 32 << 20
MIN_PREPARED_TOKENS = 4096
_NUM_TEXT_THREADS = 2
# Larger ones take turns on a thread of their own, so that a small one never waits for them.
LARGE_START_BYTES = 64 << 10
_FIRST_RETRY_S, _LAST_RETRY_S = 0.2, 30.0

OnLost = Callable[[EngineClient, MillraceError], None]
StartClient = Callable[[EngineManifest, OnLost, OnPhase], Awaitable[EngineClient]]

_log = structlog.get_logger()


@dataclass(slots=True, eq=False)
class Wanted:
    """What is to be served, and what was found for it; another engine once that one is broken.

    Args:
        let_go: lets a cache evict the engine.
    """

    selector: EngineSelector
    model_uri: str
    engine: EngineManifest
    let_go: Callable[[], None]


class Runtime:
    """Serves one engine at a time.

    Args:
        arch: of the engines that this machine runs.
        source: where engines come from.
        read_text: reads an engine's text side; blocks.
        start_client: starts a process for an engine; gives its client once it is loaded, and tells its phases.
        on_change: called when what `state` and `is_serving` say may have changed.
        exchange_s: how long what runs may go on when its engine is exchanged or unloaded; what is left ends then.
    """

    def __init__(
        self,
        arch: str,
        source: EngineSource,
        read_text: Callable[[EngineManifest], EngineText],
        start_client: StartClient,
        metrics: RuntimeMetrics,
        on_change: Callable[[], None],
        exchange_s: float = 600.0,
    ) -> None:
        self.arch = arch
        self.metrics = metrics
        self.served: ServedEngine | None = None
        self.startup = Startup()
        self._state = pb.RUNTIME_STATE_IDLE
        self._source = source
        self._read_text = read_text
        self._start_client = start_client
        self._on_change = on_change
        # The deployment that it belongs to, and the version of it that it serves.
        self.deployment, self.deployment_version = "", 0
        self._refusal: MillraceError = NoEngine(wanted="any model")
        self._calls: set[GenerationCall[Generation]] = set()
        self._exchange_s = exchange_s
        self._text_threads = ThreadPoolExecutor(_NUM_TEXT_THREADS, "text")
        self._large_text_thread = ThreadPoolExecutor(1, "large_text")
        self._background = Background()
        # Held while the engine is exchanged, by whoever does it.
        self._exchange = asyncio.Lock()
        self._wanted: Wanted | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._num_loads = 0
        self._is_holding = False
        self._released = asyncio.Event()
        self._num_prepared_tokens = 0

    @property
    def state(self) -> pb.RuntimeState.ValueType:
        """Where the daemon stands; while its engine is exchanged it is not the place for more."""
        is_exchanging = self._is_holding and self._state == pb.RUNTIME_STATE_SERVING
        return pb.RUNTIME_STATE_LOADING if is_exchanging else self._state

    @property
    def is_serving(self) -> bool:
        """Claims that starts are welcome, even if they wait for a swap."""
        return self._state == pb.RUNTIME_STATE_SERVING or self._is_holding

    # Calls and starts.

    def open_call(self, caller: Principal = ANYBODY) -> GenerationCall[Generation]:
        """A call of `caller` whose generations run here; give it back with `close_call`."""
        call = GenerationCall(self, caller)
        self._calls.add(call)
        if self._state == pb.RUNTIME_STATE_DRAINING:
            call.drain()
        return call

    def close_call(self, call: GenerationCall[Generation]) -> None:
        """Ends what still runs on `call`: nobody reads it."""
        self._calls.discard(call)
        call.close()

    def new_generation(
        self, request_id: str, on_news: OnMember, on_end: OnMember, quota: GenerationQuota
    ) -> Generation:
        """A generation that is not started yet."""
        return Generation(request_id, self.metrics, on_news, on_end, quota)

    def share_of_resumed(self, resume: pb.ResumeGeneration, cache_salt: str) -> None:
        """None: a runtime forgets the generations of a lost call."""

    def resume(self, generation: Generation, resume: pb.ResumeGeneration, cache_salt: str) -> None:
        """Ends it with an error: a runtime forgets the generations of a lost call."""
        generation.fail(GenerationNotFound(generation=resume.generation_id))

    def start(self, generation: Generation, start: pb.StartGeneration, cache_salt: str) -> None:
        """Sees to it that `generation` runs, or ends it with an error; never raises."""
        generation.trace = trace_generation(start, self.served.engine.model if self.served else "")
        try:
            served = self._served_now(start.model)
            if served is not None and start.WhichOneof("prompt") in ("token_ids", None):
                parsed = served.parse(start)
                served.submit(generation, parsed, served.encode(start), cache_salt)
                return
            num_tokens = max(start.ByteSize(), MIN_PREPARED_TOKENS)
            self._admit(num_tokens)
        except MillraceError as error:
            generation.fail(error)
            return

        def prepared(task: asyncio.Task[None]) -> None:
            self._num_prepared_tokens -= num_tokens
            _end_if_failed(generation, task)

        preparing = self._background.own(self._prepare(generation, start, cache_salt))
        preparing.add_done_callback(prepared)

    def _admit(self, num_tokens: int) -> None:
        """Counts a start that is to be prepared.

        Raises:
            QueueFull: too much is being prepared already.
        """
        # Alone, any start that came in a message may be prepared.
        waiting = self._num_prepared_tokens
        if waiting and waiting + num_tokens > MAX_PREPARED_TOKENS:
            raise QueueFull(waiting_tokens=waiting, max_waiting_tokens=MAX_PREPARED_TOKENS)
        self._num_prepared_tokens += num_tokens

    async def _prepare(
        self, generation: Generation, start: pb.StartGeneration, cache_salt: str
    ) -> None:
        """The way of a start that has to wait: for a swap, or for its text to become tokens."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                served = await self._served_soon(start.model)
                if generation.is_ended:
                    return
                parsed = served.parse(start)
                is_large = start.ByteSize() > LARGE_START_BYTES
                threads = self._large_text_thread if is_large else self._text_threads
                token_ids = await loop.run_in_executor(threads, served.encode, start)
                if self.served is served and not self._is_holding and not generation.is_ended:
                    served.submit(generation, parsed, token_ids, cache_salt)
                    return
        except MillraceError as error:
            generation.fail(error)

    def _served_now(self, model: str) -> ServedEngine | None:
        """The engine that takes starts of `model` now; None while they are held.

        Raises:
            Draining, NoEngine, EngineLost: none does, and none will soon.
            ModelNotServed: the engine here is another one's.
        """
        if self._state == pb.RUNTIME_STATE_DRAINING:
            raise Draining()
        if self._is_holding:
            return None
        if self.served is None:
            raise self._refusal
        if not self.served.answers_to(model, self.deployment):
            known = filter(None, (self.deployment, self.served.engine.model))
            raise ModelNotServed(model=model, known=", ".join(dict.fromkeys(known)))
        return self.served

    async def _served_soon(self, model: str) -> ServedEngine:
        while (served := self._served_now(model)) is None:
            await self._released.wait()
        return served

    # Engines.

    async def load(
        self, selector: EngineSelector, model_uri: str, *, anew: bool = True
    ) -> EngineManifest:
        """Serves the newest engine that fits, from now on; what runs finishes first.

        Args:
            model_uri: where the checkpoint is, in case it has to be built; "" = do not build.
            anew: loads it even where it is served already. Else what is served goes on where the newest cannot be
                had, which is told; an older one is not taken for it.
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
        self._num_loads += 1
        if self.served is None:
            self.startup.finding()
            self._become(pb.RUNTIME_STATE_LOADING)
        try:
            may_be_older = anew or self.served is None
            engine, let_go = await self._found(selector, model_uri, may_be_older)
            found_s = time.monotonic() - started
            served = None if self.served is None else self.served.engine
            if not anew and served is not None and served.manifest == engine.manifest:
                let_go()
                return engine
            wanted = Wanted(selector, model_uri, engine, let_go)
            try:
                async with self._exchange:
                    await self._exchange_for(wanted, found_s)
            finally:
                if self._wanted is not wanted:
                    wanted.let_go()
        finally:
            self._num_loads -= 1
            # While another load goes on, that one says where the daemon stands.
            if self.served is None and not self._num_loads:
                # An engine that was lost is still being restarted; else there is none.
                is_lost = self._wanted is not None
                self.startup.failed()
                self._become(pb.RUNTIME_STATE_LOADING if is_lost else pb.RUNTIME_STATE_IDLE)
        return wanted.engine

    async def _found(
        self, selector: EngineSelector, model_uri: str, may_be_older: bool
    ) -> tuple[EngineManifest, Callable[[], None]]:
        """The engine to serve, and what lets a cache evict it again."""

        async def find() -> EngineManifest:
            return await self._source.find(
                selector, model_uri, self._on_build, may_be_older=may_be_older
            )

        engine = await find()
        try:
            return engine, self._source.hold(engine)
        except EngineNotFound:  # another runtime of the same cache needed its room just now
            engine = await find()
            return engine, self._source.hold(engine)

    async def unload(self) -> None:
        """Finishes what runs and releases the engine; starts are refused from now on."""
        async with self._exchange:
            served, self.served = self.served, None
            wanted, self._wanted = self._wanted, None
            self._refusal = NoEngine(wanted="any model")
            self._become(pb.RUNTIME_STATE_IDLE)
            try:
                if served is not None:
                    await _to_the_end(self._background.own(self._release(served.client)))
            finally:
                if wanted is not None:
                    wanted.let_go()

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
        await self._background.close()
        served, self.served = self.served, None
        if served is not None:
            await served.client.stop()
        wanted, self._wanted = self._wanted, None
        if wanted is not None:
            wanted.let_go()
        self._text_threads.shutdown(wait=False)
        self._large_text_thread.shutdown(wait=False)

    async def _exchange_for(self, wanted: Wanted, found_s: float) -> None:
        with self._holding():
            old = self.served
            if old is not None:
                await self._run_dry(old.client)
            # From here on there is no way back but loading: a caller that gives up changes nothing.
            await _to_the_end(self._background.own(self._replace(old, wanted, found_s)))

    async def _run_dry(self, client: EngineClient) -> None:
        """Lets what runs finish; a client that reads no more must not keep an engine for ever."""
        try:
            async with asyncio.timeout(self._exchange_s):
                await client.wait_idle()
        except TimeoutError:
            num_ended = client.fail_all(EngineLost(problem="it is served no more"))
            _log.warning("exchange_grace_ended", generations=num_ended)

    async def _release(self, client: EngineClient) -> None:
        try:
            await self._run_dry(client)
        finally:
            await client.stop()

    async def _replace(self, old: ServedEngine | None, wanted: Wanted, found_s: float) -> None:
        self.served = None
        try:
            if old is not None:
                await old.client.stop()
            await self._bring_up(wanted, found_s)
        except Exception:  # whatever it is goes on to the caller, who is served as before
            if old is not None:
                _log.warning("engine_swap_failed", wanted=wanted.engine.name)
                if not await self._revive():
                    self._keep()
            raise
        before, self._wanted = self._wanted, wanted
        if before is not None:
            before.let_go()

    def _keep(self) -> None:
        """Has the wanted engine, which is not served, loaded for as long as it takes."""
        # One that is there already sleeps, or waits for the exchange that asks for a new one.
        if self._keeper is not None:
            self._keeper.cancel()
        self._keeper = self._background.keep("revive_engine", self._keep_reviving)

    async def _keep_reviving(self) -> None:
        delay_s = _FIRST_RETRY_S
        while True:
            async with self._exchange:
                if self._has_all() or await self._revive(delay_s):
                    return
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, _LAST_RETRY_S)

    def _has_all(self) -> bool:
        is_draining = self._state == pb.RUNTIME_STATE_DRAINING
        return self.served is not None or self._wanted is None or is_draining

    async def _revive(self, retry_s: float = _FIRST_RETRY_S) -> bool:
        """Tries to load the wanted engine, which was served before; false when it failed."""
        assert self._wanted is not None, "nothing is to be served"
        try:
            await self._bring_up(self._wanted, 0.0)
        except Exception as error:  # an edge: nobody else waits for this, or tries again
            known = error if isinstance(error, MillraceError) else Internal()
            self.startup.failed()
            self._refusal = EngineLost(problem=str(known).rstrip("."), retry_after_s=retry_s)
            _log.error(
                "engine_restart_failed",
                reason=known.reason,
                problem=str(known),
                exc_info=None if known is error else error,
            )
            return False
        return True

    async def _bring_up(self, wanted: Wanted, found_s: float) -> None:
        if self._state == pb.RUNTIME_STATE_DRAINING:
            raise Draining()
        self.startup.loading(found_s)
        self._become(pb.RUNTIME_STATE_LOADING)
        try:
            served = await self._start(wanted.engine)
        except (DigestMismatch, BlobNotFound) as damage:
            try:
                wanted.engine = await self._source.repair(
                    wanted.engine, wanted.selector, wanted.model_uri, self._on_build
                )
                let_go, wanted.let_go = wanted.let_go, self._source.hold(wanted.engine)
                let_go()
            except EngineNotFound:
                raise damage from None
            self._become(pb.RUNTIME_STATE_LOADING)
            served = await self._start(wanted.engine)
        engine = wanted.engine
        if served.client.is_over:
            raise EngineLost(problem="it ended right after it was loaded")
        self.startup.loaded(served.client.phases)
        self.served = served
        self._become(pb.RUNTIME_STATE_SERVING)
        limits = served.client.limits
        _log.info(
            "engine_loaded",
            engine=engine.name,
            model=engine.model,
            **{f"{name}_s": round(seconds, 3) for name, seconds in self.startup.phases},
            max_sequence_tokens=limits.max_sequence_tokens,
            max_sequences=limits.max_sequences,
            kv_blocks=limits.num_blocks,
            kv_reason=limits.kv_reason,
        )

    async def _start(self, engine: EngineManifest) -> ServedEngine:
        """The engine's process and text side, made at the same time."""
        starting = asyncio.ensure_future(
            self._start_client(engine, self._on_engine_lost, self.startup.began)
        )
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
        self._keep()

    @contextmanager
    def _holding(self) -> Iterator[None]:
        """While an engine is served and exchanged, starts wait instead of being refused."""
        self._is_holding = self.served is not None
        self._released.clear()
        self._on_change()
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
