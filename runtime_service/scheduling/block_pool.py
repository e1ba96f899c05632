"""Which KV blocks are free and how often the others are held: ids and counts, never tensors.

Free blocks form one doubly linked list in the order in which they will be taken. It is threaded
through two arrays, so that a block in its middle (found again by the prefix index) leaves in O(1).
"""


class BlockPool:
    """Blocks 0 to `num_blocks - 1`, all free, in order of their ids."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        # Entry `num_blocks` is the list's ring: its next is the first to be taken.
        self._ring = num_blocks
        self._next: list[int] = [*range(1, num_blocks + 1), 0]
        self._previous: list[int] = [num_blocks, *range(num_blocks)]
        self._holders = [0] * num_blocks

    def take(self) -> int:
        """The next free block, now held once."""
        assert self.num_free, "take() from an empty pool"
        block = self._next[self._ring]
        self._unlink(block)
        self._holders[block] = 1
        return block

    def hold(self, block: int) -> None:
        """Holds `block` once more, also where it was free."""
        if not self._holders[block]:
            self._unlink(block)
        self._holders[block] += 1

    def release(self, block: int, is_worth_keeping: bool) -> None:
        """Ends one hold. A block that becomes free is taken last if worth keeping, else next."""
        holders = self._holders[block] - 1
        assert holders >= 0, f"block {block} was released more often than held"
        self._holders[block] = holders
        if not holders:
            ring = self._ring
            self._link(block, self._previous[ring] if is_worth_keeping else ring)

    def num_holders(self, block: int) -> int:
        """How often `block` is held; 0 is free."""
        return self._holders[block]

    def free_blocks(self) -> list[int]:
        """Free blocks in the order in which they will be taken."""
        blocks = []
        block = self._next[self._ring]
        while block != self._ring:
            blocks.append(block)
            block = self._next[block]
        return blocks

    def _unlink(self, block: int) -> None:
        previous, following = self._previous[block], self._next[block]
        self._next[previous] = following
        self._previous[following] = previous
        self.num_free -= 1

    def _link(self, block: int, previous: int) -> None:
        following = self._next[previous]
        self._next[previous] = self._previous[following] = block
        self._previous[block], self._next[block] = previous, following
        self.num_free += 1
