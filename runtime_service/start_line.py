"""The way of a start to the engine: at once, or once an engine is exchanged, or its text has become tokens."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import structlog
from millrace.runtime.v1 import runtime_pb2 as pb

from runtime_service.engine_keeper import EngineKeeper
from runtime_service.generation import Generation
from runtime_service.generation_trace import trace_generation
from runtime_service.served_engine import ServedEngine
from shared.background import Background
from shared.errors import Draining, Internal, MillraceError, QueueFull

# Of starts that wait: a byte of a start counts as a token, which it is at most, and a start as at least some.
MAX_PREPARED_TOKENS = 32 << 20
MIN_PREPARED_TOKENS = 4096
_NUM_TEXT_THREADS = 2
# Larger ones take turns on a thread of their own, so that a small one never waits for them.
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
        self._text_threads = ThreadPoolExecutor(_NUM_TEXT_THREADS, "text")
        self._large_text_thread = ThreadPoolExecutor(1, "large_text")
        self._background = Background()
        self._num_prepared_tokens = 0

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
            self._admit(num_tokens)
        except MillraceError as error:
            generation.fail(error)
            return

        def prepared(task: asyncio.Task[None]) -> None:
            self._num_prepared_tokens -= num_tokens
            _end_if_failed(generation, task)

        preparing = self._background.own(self._prepare(generation, start, cache_salt))
        preparing.add_done_callback(prepared)

    async def close(self) -> None:
        """Ends what still waits."""
        await self._background.close()
        self._text_threads.shutdown(wait=False)
        self._large_text_thread.shutdown(wait=False)

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
        """The way of a start that has to wait."""
        loop, keeper = asyncio.get_running_loop(), self._keeper
        try:
            while not generation.is_ended:
                served = await self._taker(generation)
                self._check_model(served, start.model)
                parsed = served.parse(start)
                is_large = start.ByteSize() > LARGE_START_BYTES
                threads = self._large_text_thread if is_large else self._text_threads
                token_ids = await loop.run_in_executor(threads, served.encode, start)
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
