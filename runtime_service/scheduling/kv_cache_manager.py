"""Which blocks hold which tokens' keys and values, and which of them can be found again.

A full block is named by a chain: SHA-256 over its parent's name and its token ids, beginning with
the salt. A name enters the index when all of the block's tokens were read back, and leaves it when
the block is taken for something else. Knows sequences only by their token ids and block tables.
"""

import hashlib
from array import array
from collections.abc import Iterable

from runtime_service.scheduling.block_pool import BlockPool


class KVCacheManager:
    """The blocks of one KV cache.

    Args:
        block_tokens: tokens in a block.
    """

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.pool = BlockPool(num_blocks)
        self._block_of: dict[bytes, int] = {}
        self._name_of: list[bytes | None] = [None] * num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that can be taken, remembered ones too."""
        return self.pool.num_free

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens`."""
        return -(-num_tokens // self.block_tokens)

    def root_name(self, salt: str) -> bytes:
        """The parent of first blocks: prefixes of different salts never meet."""
        return hashlib.sha256(salt.encode()).digest()

    def find_prefix(self, names: list[bytes], token_ids: list[int]) -> list[int]:
        """The longest run of remembered blocks that `token_ids` begins with.

        The last token is never among them: its logits must be computed.

        Args:
            names: the root, then the names of `token_ids`' first blocks as far as known; those
                that the search needs are appended.
        """
        blocks: list[int] = []
        size = self.block_tokens
        for index in range((len(token_ids) - 1) // size):
            if index + 1 == len(names):
                names.append(_name(names[index], token_ids[index * size : (index + 1) * size]))
            block = self._block_of.get(names[index + 1])
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_free_among(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` nobody holds: holding them leaves that many fewer to take."""
        num_holders = self.pool.num_holders
        return sum(not num_holders(block) for block in blocks)

    def hold(self, blocks: Iterable[int]) -> None:
        """Shares `blocks`."""
        for block in blocks:
            self.pool.hold(block)

    def take(self) -> int:
        """A free block, the one used longest ago; forgets what it held."""
        block = self.pool.take()
        name = self._name_of[block]
        if name is not None:
            del self._block_of[name]
            self._name_of[block] = None
        return block

    def release(self, blocks: list[int]) -> None:
        """Gives back a block table; its end is forgotten before its beginning."""
        pool, name_of = self.pool, self._name_of
        for block in reversed(blocks):
            pool.release(block, name_of[block] is not None)

    def remember(
        self, names: list[bytes], token_ids: list[int], blocks: list[int], begin: int, end: int
    ) -> None:
        """Lets blocks [begin, end) of a sequence be found: all of their tokens were read back.

        Where a name is known already, its block stays the one that is found.

        Args:
            names: as in `find_prefix`.
        """
        size = self.block_tokens
        for index in range(len(names) - 1, end):
            names.append(_name(names[index], token_ids[index * size : (index + 1) * size]))
        for index in range(begin, end):
            name = names[index + 1]
            if name not in self._block_of:
                self._block_of[name] = blocks[index]
                self._name_of[blocks[index]] = name


def _name(parent: bytes, token_ids: list[int]) -> bytes:
    return hashlib.sha256(parent + array("I", token_ids).tobytes()).digest()
