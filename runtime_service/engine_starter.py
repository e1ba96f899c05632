"""From what is to be served to an engine that runs: found or built, held where it is cached, repaired, started.

Which one is served, and since when, is `engine_keeper.py`'s.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from millrace.runtime.v1 import runtime_pb2 as pb

from runtime_service.engine_client import EngineClient
from runtime_service.engine_core import OnPhase
from runtime_service.engine_source import EngineSource
from runtime_service.served_engine import EngineText, ServedEngine
from shared.engine import EngineManifest, EngineSelector
from shared.errors import BlobNotFound, DigestMismatch, EngineNotFound, MillraceError

OnLost = Callable[[EngineClient, MillraceError], None]
OnState = Callable[[pb.RuntimeState.ValueType], None]
StartClient = Callable[[EngineManifest, OnLost, OnPhase], Awaitable[EngineClient]]


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


class EngineStarter:
    """Starts engines of one source.

    Args:
        read_text: reads an engine's text side; blocks.
        start_client: starts a process for an engine; gives its client once it is loaded, and tells its phases.
    """

    def __init__(
        self,
        source: EngineSource,
        read_text: Callable[[EngineManifest], EngineText],
        start_client: StartClient,
    ) -> None:
        self._source = source
        self._read_text = read_text
        self._start_client = start_client

    async def find(
        self, selector: EngineSelector, model_uri: str, on_state: OnState, *, may_be_older: bool
    ) -> Wanted:
        """The engine to serve, which no cache evicts until it is let go.

        Args:
            model_uri: where the checkpoint is, in case it has to be built; "" = do not build.
            on_state: called with BUILDING where it has to be.
            may_be_older: as `EngineSource.find` takes it.
        Raises:
            MillraceError: as `EngineSource.find`.
        """
        on_build = _telling(on_state, pb.RUNTIME_STATE_BUILDING)

        async def find() -> EngineManifest:
            return await self._source.find(selector, model_uri, on_build, may_be_older=may_be_older)

        engine = await find()
        try:
            let_go = self._source.hold(engine)
        except EngineNotFound:  # another runtime of the same cache needed its room just now
            engine = await find()
            let_go = self._source.hold(engine)
        return Wanted(selector, model_uri, engine, let_go)

    async def start(
        self, wanted: Wanted, on_state: OnState, on_phase: OnPhase, on_lost: OnLost
    ) -> ServedEngine:
        """The wanted engine, running; where the store's copy is damaged it is repaired first, or made anew.

        Args:
            on_state: called with LOADING, and with BUILDING where it is built again.
            on_phase, on_lost: for its client.
        Raises:
            MillraceError: it cannot be loaded.
        """
        on_state(pb.RUNTIME_STATE_LOADING)
        try:
            return await self._start(wanted.engine, on_lost, on_phase)
        except (DigestMismatch, BlobNotFound) as damage:
            await self._repair(wanted, damage, on_state)
        on_state(pb.RUNTIME_STATE_LOADING)
        return await self._start(wanted.engine, on_lost, on_phase)

    async def _repair(self, wanted: Wanted, damage: MillraceError, on_state: OnState) -> None:
        on_build = _telling(on_state, pb.RUNTIME_STATE_BUILDING)
        try:
            wanted.engine = await self._source.repair(
                wanted.engine, wanted.selector, wanted.model_uri, on_build
            )
            let_go, wanted.let_go = wanted.let_go, self._source.hold(wanted.engine)
            let_go()
        except EngineNotFound:
            raise damage from None

    async def _start(
        self, engine: EngineManifest, on_lost: OnLost, on_phase: OnPhase
    ) -> ServedEngine:
        """The engine's process and text side, made at the same time."""
        starting = asyncio.ensure_future(self._start_client(engine, on_lost, on_phase))
        try:
            text = await asyncio.to_thread(self._read_text, engine)
            return ServedEngine(engine, text, await starting)
        except BaseException:
            starting.cancel()
            await asyncio.wait({starting})
            if not starting.cancelled() and starting.exception() is None:
                await starting.result().stop()
            raise


def _telling(on_state: OnState, state: pb.RuntimeState.ValueType) -> Callable[[], None]:
    return lambda: on_state(state)
