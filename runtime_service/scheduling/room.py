"""Room in the KV cache: whether a sequence fits, and who gives way to one that does not."""

from collections.abc import Callable

from runtime_service.scheduling.kv_cache_manager import KVCacheManager
from runtime_service.scheduling.roster import Roster
from runtime_service.scheduling.sequence import Sequence

# Of the blocks, kept free when a sequence is admitted beside others, so that they can grow.
_GROWTH_RESERVE = 0.01


class Room:
    """Free rows and blocks, and those that can be had by preemption.

    Args:
        preempt: takes a sequence's row and blocks, and lets it wait.
    """

    def __init__(
        self, kv: KVCacheManager, roster: Roster, preempt: Callable[[Sequence], None]
    ) -> None:
        self._kv = kv
        self._roster = roster
        self._preempt = preempt
        self._num_blocks = kv.pool.num_blocks
        self._growth_reserve = int(self._num_blocks * _GROWTH_RESERVE)

    def has(self, num_blocks: int) -> bool:
        """Whether a sequence may take so many free blocks: the last ones only if it runs alone."""
        reserve = self._growth_reserve if self._roster.running else 0
        return self._kv.num_free - num_blocks >= reserve

    def make_for(self, first: Sequence | None) -> None:
        """Preempts for the first waiting sequence: stalled ones, and those of lower priority."""
        if first is None:
            return
        victims = self._roster.below(first.order[0])
        if not victims:
            return
        num_blocks = self._kv.num_blocks_for(len(first.token_ids))
        needed = min(num_blocks + self._growth_reserve, self._num_blocks)
        # Not in vain: counts shared blocks twice, which only real pressure makes matter.
        if self._kv.num_free + sum(len(victim.block_ids) for victim in victims) < needed:
            return
        for victim in victims:
            if self._roster.free_rows and self._kv.num_free >= needed:
                break
            self._preempt(victim)
        self._roster.compact()

    def take_block_for(self, sequence: Sequence) -> int | None:
        """One more block for `sequence`, from ones that come after it if need be."""
        while not self._kv.num_free:
            victim = self._roster.worst_after(sequence)
            if victim is None:
                return None
            self._preempt(victim)
        block = self._kv.take()
        sequence.block_ids.append(block)
        sequence.capacity += self._kv.block_tokens
        sequence.plan_event()
        return block
