"""The way of a start to the engine: at once, or once an engine is exchanged, or its text has become tokens."""

import asyncio
from collections.abc import Callable
from functools import partial

import structlog
from millrace.runtime.v1 import runtime_pb2 as pb

from runtime_service.engine_keeper import EngineKeeper
from runtime_service.generation import Generation
from runtime_service.generation_trace import trace_generation
from runtime_service.served_engine import ServedEngine
from runtime_service.tenant_queue import TenantQueue
from runtime_service.text_line import TextLine
from shared.background import Background
from shared.errors import Draining, Internal, MillraceError

# Of starts that wait, as a `TenantQueue` has it: a byte of a start counts as a token, which it is at most, and a start
# as at least some.
MAX_PREPARED_TOKENS = 32 << 20
MIN_PREPARED_TOKENS = 4096
_NUM_TEXT_THREADS = 2
# Larger ones wait for a thread of their own, so that a small one never waits for them.
LARGE_START_BYTES = 64 << 10

_log = structlog.get_logger()


class StartLine:
    """Where starts wait until the engine has them.

    Args:
        keeper: of the engine that takes them.
        check_model: raises where an engine is not what a start's `model` names.
    """

    def __init__(
        self, keeper: EngineKeeper, check_model: Callable[[ServedEngine, str], None]
    ) -> None:
        self._keeper = keeper
        self._check_model = check_model
        self._texts = TextLine(_NUM_TEXT_THREADS, "text")
        self._large_texts = TextLine(1, "large_text")
        self._background = Background()
        self._prepared = TenantQueue(MAX_PREPARED_TOKENS)

    def start(self, generation: Generation, start: pb.StartGeneration, cache_salt: str) -> None:
        """Sees to it that `generation` runs, or ends it with an error; never raises."""
        served = self._keeper.served
        generation.trace = trace_generation(start, served.engine.model if served else "")
        try:
            served = self._keeper.takes_now()
            if served is not None:
                self._check_model(served, start.model)
                if start.WhichOneof("prompt") in ("token_ids", None):
                    parsed = served.parse(start)
                    served.submit(generation, parsed, served.encode(start), cache_salt)
                    return
            num_tokens = max(start.ByteSize(), MIN_PREPARED_TOKENS)
            self._prepared.check_room(num_tokens, cache_salt)
        except MillraceError as error:
            generation.fail(error)
            return
        self._prepared.add(generation, cache_salt, num_tokens)

        def prepared(task: asyncio.Task[None]) -> None:
            self._prepared.take(generation)
            _end_if_failed(generation, task)

        preparing = self._background.own(self._prepare(generation, start, cache_salt))
        preparing.add_done_callback(prepared)

    async def close(self) -> None:
        """Ends what still waits."""
        await self._background.close()
        self._texts.close()
        self._large_texts.close()

    async def _prepare(
        self, generation: Generation, start: pb.StartGeneration, cache_salt: str
    ) -> None:
        """The way of a start that has to wait."""
        keeper, num_bytes = self._keeper, start.ByteSize()
        line = self._large_texts if num_bytes > LARGE_START_BYTES else self._texts
        try:
            while not generation.is_ended:
                served = await self._taker(generation)
                self._check_model(served, start.model)
                parsed = served.parse(start)
                async with line.turn(cache_salt, num_bytes):
                    if generation.is_ended:  # nobody waits for it any more
                        return
                    token_ids = await line.run(partial(served.encode, start))
                if keeper.has(served) and not generation.is_ended:
                    served.submit(generation, parsed, token_ids, cache_salt)
                    return
        except MillraceError as error:
            generation.fail(error)

    async def _taker(self, generation: Generation) -> ServedEngine:
        """The engine that takes starts, soon; one that ends meanwhile is held no more, and counts no more."""
        generation.held = asyncio.current_task()
        try:
            return await self._keeper.takes_soon()
        finally:
            generation.held = None


def _end_if_failed(generation: Generation, task: asyncio.Task[None]) -> None:
    """A start whose way failed unforeseen still ends with one event."""
    if task.cancelled():
        generation.fail(Draining())
    elif (error := task.exception()) is not None:
        _log.error("start_failed_unforeseen", exc_info=error)
        generation.fail(Internal())
