"""Threads that text waits for, one tenant's in turn with the others'.

Knows no tokenizer: who has its turn does its work on a thread, and gives the turn back.
"""

import asyncio
import heapq
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from itertools import count
from typing import TypeVar

from runtime_service.scheduling.turns import Turns

Result = TypeVar("Result")
# An engine's turns are by priority, and count its steps. What a text costs is known when it comes.
_PRIORITY, _STEP = 0, 0
# To hand a text over takes as long as to tokenize so much of it (some 0.1 ms).
_LEAST_BYTES = 512


class TextLine:
    """Where texts wait for one of `num_threads` threads: tenants take turns by bytes, a tenant's own go by arrival."""

    def __init__(self, num_threads: int, name: str) -> None:
        self._threads = ThreadPoolExecutor(num_threads, name)
        self._num_free = num_threads
        self._turns = Turns()
        self._arrivals = count()
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []

    @asynccontextmanager
    async def turn(self, tenant: str, num_bytes: int) -> AsyncIterator[None]:
        """Holds a free thread from when the turn of a text of `tenant` has come; for one `run`."""
        cost = max(num_bytes, _LEAST_BYTES)
        turn = self._turns.enter(_PRIORITY, tenant, cost, _STEP)
        came: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (turn, next(self._arrivals), came))
        self._call_next()
        try:
            await came
            self._turns.came(_PRIORITY, turn)
            yield
        finally:
            self._turns.leave(_PRIORITY, tenant, 0, _STEP)
            # One that was called has a thread to give back, even if it was cancelled meanwhile.
            if came.done() and not came.cancelled():
                self._num_free += 1
                self._call_next()

    async def run(self, work: Callable[[], Result]) -> Result:
        """What `work` gives, on a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        """Does nothing more."""
        self._threads.shutdown(wait=False)

    def _call_next(self) -> None:
        while self._num_free and self._waiting:
            _, _, came = heapq.heappop(self._waiting)
            if not came.done():
                self._num_free -= 1
                came.set_result(None)
