"""The one engine that a daemon serves: loaded, exchanged without losing what runs, brought back when it is lost.

It says where the daemon stands, and so whether starts are welcome, wait or are refused; what a start is it does not
know.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog
from millrace.runtime.v1 import runtime_pb2 as pb

from runtime_service.engine_client import EngineClient
from runtime_service.engine_starter import EngineStarter, Wanted
from runtime_service.metrics import RuntimeMetrics
from runtime_service.served_engine import ServedEngine
from runtime_service.startup import Startup
from shared.background import Background
from shared.engine import EngineManifest, EngineSelector
from shared.errors import (
    ArchMismatch,
    Draining,
    EngineLost,
    Internal,
    MillraceError,
    NoEngine,
)

_FIRST_RETRY_S, _LAST_RETRY_S = 0.2, 30.0

_log = structlog.get_logger()


class EngineKeeper:
    """Keeps one engine served at a time.

    Args:
        arch: of the engines that this machine runs.
        starter: finds engines and starts them.
        on_change: called when what `state` and `is_serving` say may have changed.
        exchange_s: how long what runs may go on when its engine is exchanged or unloaded; what is left ends then.
    """

    def __init__(
        self,
        arch: str,
        starter: EngineStarter,
        metrics: RuntimeMetrics,
        on_change: Callable[[], None],
        exchange_s: float,
    ) -> None:
        self.arch = arch
        self.served: ServedEngine | None = None
        self.startup = Startup()
        self._state = pb.RUNTIME_STATE_IDLE
        self._starter = starter
        self._metrics = metrics
        self._on_change = on_change
        self._exchange_s = exchange_s
        self._refusal: MillraceError = NoEngine(wanted="any model")
        self._background = Background()
        # Held while the engine is exchanged, by whoever does it.
        self._exchange = asyncio.Lock()
        self._wanted: Wanted | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._num_loads = 0
        self._is_holding = False
        self._released = asyncio.Event()

    @property
    def state(self) -> pb.RuntimeState.ValueType:
        """Where the daemon stands; while its engine is exchanged it is not the place for more."""
        is_exchanging = self._is_holding and self._state == pb.RUNTIME_STATE_SERVING
        return pb.RUNTIME_STATE_LOADING if is_exchanging else self._state

    @property
    def is_serving(self) -> bool:
        """Claims that starts are welcome, even if they wait for a swap."""
        return self._state == pb.RUNTIME_STATE_SERVING or self._is_holding

    @property
    def is_draining(self) -> bool:
        """Claims that nothing new is taken any more."""
        return self._state == pb.RUNTIME_STATE_DRAINING

    def takes_now(self) -> ServedEngine | None:
        """The engine that takes starts now; None while they are held.

        Raises:
            Draining, NoEngine, EngineLost: none does, and none will soon.
        """
        if self.is_draining:
            raise Draining()
        if self._is_holding:
            return None
        if self.served is None:
            raise self._refusal
        return self.served

    async def takes_soon(self) -> ServedEngine:
        """Likewise, once starts are held no more."""
        while (served := self.takes_now()) is None:
            await self._released.wait()
        return served

    def has(self, served: ServedEngine) -> bool:
        """Claims that `served` is still the engine that takes starts."""
        return self.served is served and not self._is_holding

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
            wanted = await self._starter.find(
                selector, model_uri, self._get_ready, may_be_older=may_be_older
            )
            found_s = time.monotonic() - started
            served = None if self.served is None else self.served.engine
            if not anew and served is not None and served.manifest == wanted.engine.manifest:
                wanted.let_go()
                return wanted.engine
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

    def refuse(self) -> None:
        """Takes nothing new from now on: starts are refused with DRAINING, those that are held too."""
        self._become(pb.RUNTIME_STATE_DRAINING)
        self._released.set()

    async def close(self) -> None:
        """Ends the engine process, and whatever brings another one up."""
        self._state = pb.RUNTIME_STATE_DRAINING
        await self._background.close()
        served, self.served = self.served, None
        if served is not None:
            await served.client.stop()
        wanted, self._wanted = self._wanted, None
        if wanted is not None:
            wanted.let_go()

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
        return self.served is not None or self._wanted is None or self.is_draining

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
        if self.is_draining:
            raise Draining()
        self.startup.loading(found_s)
        served = await self._starter.start(
            wanted, self._get_ready, self.startup.began, self._on_engine_lost
        )
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

    def _on_engine_lost(self, client: EngineClient, error: MillraceError) -> None:
        served = self.served
        if served is None or served.client is not client:
            return  # lost while it was being exchanged: whoever does that goes on
        self.served = None
        self._refusal = error
        self._metrics.engine_restarts += 1
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

    def _get_ready(self, state: pb.RuntimeState.ValueType) -> None:
        """Notes what is being done for an engine; one that is served meanwhile counts more."""
        if self.served is None:
            self._become(state)

    def _become(self, state: pb.RuntimeState.ValueType) -> None:
        if not self.is_draining:
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
