"""What a client can still go on with after it has lost its call: generations, and streams of them.

What is kept is small: the start and the token ids that were sent. Going on is recomputing.
"""

import asyncio
from collections import deque
from typing import Generic, Protocol, TypeVar

from runtime_service.gateway.routed_generation import RoutedGeneration
from shared.errors import GenerationNotFound

# Of what has ended; the oldest go first.
MAX_KEPT_BYTES = 256 << 20


class Keepable(Protocol):
    """What a client can go on with.

    `generation_id` is what the client was told, `cache_salt` whose it is, and `num_kept_bytes` what
    it takes to keep it.
    """

    @property
    def generation_id(self) -> str:
        """Names it, and cannot be guessed."""

    @property
    def cache_salt(self) -> str:
        """The tenant that it belongs to."""

    @property
    def num_kept_bytes(self) -> int:
        """About what it takes."""


Item = TypeVar("Item", bound=Keepable)


class Kept(Generic[Item]):
    """Knows items by the id that their clients were told.

    Args:
        keep_s: after their end.
    """

    def __init__(self, keep_s: float) -> None:
        self.keep_s = keep_s
        self._items: dict[str, Item] = {}
        self._ended: deque[tuple[Item, int, asyncio.TimerHandle]] = deque()
        self._ended_bytes = 0

    def add(self, item: Item) -> None:
        """Knows it from now on, in place of one of the same id."""
        self._items[item.generation_id] = item

    def find(self, generation_id: str, cache_salt: str) -> Item:
        """The item of that id.

        Raises:
            GenerationNotFound: there is none any more, or it is another tenant's.
        """
        found = self._items.get(generation_id)
        if found is None or found.cache_salt != cache_salt:
            raise GenerationNotFound(generation=generation_id)
        return found

    def ended(self, item: Item) -> None:
        """Forgets it, after a while."""
        num_bytes = item.num_kept_bytes
        # One timer for each: what is forgotten before its time is referred to by none.
        timer = asyncio.get_running_loop().call_later(self.keep_s, self._forget_oldest)
        self._ended.append((item, num_bytes, timer))
        self._ended_bytes += num_bytes
        while self._ended_bytes > MAX_KEPT_BYTES:
            self._forget_oldest().cancel()

    def forget(self, item: Item) -> None:
        """Forgets it at once; a no-op where another one has its id."""
        if self._items.get(item.generation_id) is item:
            del self._items[item.generation_id]

    def _forget_oldest(self) -> asyncio.TimerHandle:
        """Its timer: timers of one length fire in order, so that which fires is the oldest's."""
        item, num_bytes, timer = self._ended.popleft()
        self._ended_bytes -= num_bytes
        self.forget(item)
        return timer


KeptGenerations = Kept[RoutedGeneration]
