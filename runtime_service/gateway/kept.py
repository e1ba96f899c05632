"""Generations that a client can still go on with after it has lost its call.

What is kept is small: the start and the token ids that were sent. Going on is recomputing.
"""

import asyncio
from collections import deque

from runtime_service.gateway.routed_generation import RoutedGeneration
from shared.errors import GenerationNotFound

# Of generations that have ended; the oldest go first.
MAX_KEPT_BYTES = 256 << 20
# As measured: what one takes beside its prompt and its tokens, and a token, of a prompt or drawn.
GENERATION_BYTES = 6 << 10
_TOKEN_BYTES = 8


class KeptGenerations:
    """Knows generations by the id that their clients were told.

    Args:
        keep_s: after their end.
    """

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._generations: dict[str, RoutedGeneration] = {}
        self._ended: deque[tuple[RoutedGeneration, int]] = deque()
        self._ended_bytes = 0

    def add(self, generation: RoutedGeneration) -> None:
        """Knows it from now on, in place of one of the same id."""
        self._generations[generation.generation_id] = generation

    def find(self, generation_id: str, cache_salt: str) -> RoutedGeneration:
        """The generation of that id.

        Raises:
            GenerationNotFound: there is none any more, or it is another tenant's.
        """
        found = self._generations.get(generation_id)
        if found is None or found.cache_salt != cache_salt:
            raise GenerationNotFound(generation=generation_id)
        return found

    def ended(self, generation: RoutedGeneration) -> None:
        """Forgets it, after a while."""
        start = generation.start
        num_tokens = len(start.token_ids.ids)
        num_tokens += sum(len(sample.token_ids) for sample in generation.samples)
        num_bytes = GENERATION_BYTES + start.ByteSize() + _TOKEN_BYTES * num_tokens
        self._ended.append((generation, num_bytes))
        self._ended_bytes += num_bytes
        while self._ended_bytes > MAX_KEPT_BYTES:
            self._forget_oldest()
        asyncio.get_running_loop().call_later(self._keep_s, self._expire, generation)

    def forget(self, generation: RoutedGeneration) -> None:
        """Forgets it at once; a no-op where another one has its id."""
        if self._generations.get(generation.generation_id) is generation:
            del self._generations[generation.generation_id]

    def _expire(self, generation: RoutedGeneration) -> None:
        # Timers of one length fire in order: only what room was made of is gone before.
        if self._ended and self._ended[0][0] is generation:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        generation, num_bytes = self._ended.popleft()
        self._ended_bytes -= num_bytes
        self.forget(generation)
