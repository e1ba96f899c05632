"""Law 4: the pool never leaks."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from runtime_service.scheduling.block_pool import BlockPool
from runtime_service.scheduling.kv_cache_manager import KVCacheManager


def test_blocks_are_taken_in_the_order_in_which_they_became_free() -> None:
    pool = BlockPool(4)
    assert [pool.take() for _ in range(4)] == [0, 1, 2, 3]
    for block in (2, 0, 3, 1):
        pool.release(block, is_worth_keeping=True)
    assert pool.free_blocks() == [2, 0, 3, 1]


def test_block_not_worth_keeping_is_taken_next() -> None:
    pool = BlockPool(3)
    block = pool.take()
    pool.release(block, is_worth_keeping=False)
    assert pool.free_blocks() == [block, 1, 2]


def test_releasing_a_free_block_is_refused() -> None:
    pool = BlockPool(2)
    with pytest.raises(AssertionError, match="more often than held"):
        pool.release(0, is_worth_keeping=True)


def test_taking_from_an_empty_pool_is_refused() -> None:
    pool = BlockPool(1)
    pool.take()
    with pytest.raises(AssertionError, match="empty pool"):
        pool.take()


class PoolMachine(RuleBasedStateMachine):
    """A pool beside a model of it: two plain containers."""

    NUM_BLOCKS = 5

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(self.NUM_BLOCKS)
        self.free = list(range(self.NUM_BLOCKS))
        self.num_holders = [0] * self.NUM_BLOCKS

    @precondition(lambda self: self.free)
    @rule()
    def take(self) -> None:
        block = self.free.pop(0)
        assert self.pool.take() == block
        self.num_holders[block] = 1

    @rule(block=st.integers(0, NUM_BLOCKS - 1))
    def hold(self, block: int) -> None:
        self.pool.hold(block)
        if not self.num_holders[block]:
            self.free.remove(block)
        self.num_holders[block] += 1

    @precondition(lambda self: any(self.num_holders))
    @rule(choice=st.integers(0, NUM_BLOCKS - 1), is_worth_keeping=st.booleans())
    def release(self, choice: int, is_worth_keeping: bool) -> None:
        held = [block for block, num_holders in enumerate(self.num_holders) if num_holders]
        block = held[choice % len(held)]
        self.pool.release(block, is_worth_keeping)
        self.num_holders[block] -= 1
        if not self.num_holders[block]:
            self.free.insert(len(self.free) if is_worth_keeping else 0, block)

    @invariant()
    def every_block_is_free_or_held_as_counted(self) -> None:
        assert self.pool.free_blocks() == self.free
        assert self.pool.num_free == len(self.free)
        blocks = range(self.NUM_BLOCKS)
        assert [self.pool.num_holders(block) for block in blocks] == self.num_holders


TestPoolAgainstItsModel = PoolMachine.TestCase
TestPoolAgainstItsModel.settings = settings(
    derandomize=True, database=None, deadline=None, max_examples=100, stateful_step_count=50
)


def test_prefix_is_found_where_tokens_and_salt_are_the_same() -> None:
    kv = KVCacheManager(num_blocks=8, block_tokens=2)
    tokens = [1, 2, 3, 4, 5]
    blocks = [kv.take() for _ in range(3)]
    kv.remember([kv.root_name("a")], tokens, blocks, 0, 2)
    assert kv.find_prefix([kv.root_name("a")], tokens) == blocks[:2]
    assert kv.find_prefix([kv.root_name("a")], [1, 2, 9, 9, 9]) == blocks[:1]
    assert kv.find_prefix([kv.root_name("b")], tokens) == []


def test_last_token_is_never_found() -> None:
    """Its logits must be computed."""
    kv = KVCacheManager(num_blocks=8, block_tokens=2)
    blocks = [kv.take(), kv.take()]
    kv.remember([kv.root_name("")], [1, 2, 3, 4], blocks, 0, 2)
    assert kv.find_prefix([kv.root_name("")], [1, 2, 3, 4]) == blocks[:1]


def test_block_is_forgotten_when_it_is_taken_for_something_else() -> None:
    kv = KVCacheManager(num_blocks=2, block_tokens=1)
    blocks = [kv.take(), kv.take()]
    kv.remember([kv.root_name("")], [1, 2], blocks, 0, 2)
    kv.release(blocks)
    assert kv.find_prefix([kv.root_name("")], [1, 2, 3]) == blocks
    kv.take()
    # The end of a prefix goes before its beginning.
    assert kv.find_prefix([kv.root_name("")], [1, 2, 3]) == blocks[:1]


def test_least_recently_used_prefix_is_forgotten_first() -> None:
    kv = KVCacheManager(num_blocks=2, block_tokens=1)
    old, new = kv.take(), kv.take()
    kv.remember([kv.root_name("")], [1], [old], 0, 1)
    kv.remember([kv.root_name("")], [2], [new], 0, 1)
    kv.release([old])
    kv.release([new])
    kv.hold([old])
    kv.release([old])
    assert kv.take() == new
