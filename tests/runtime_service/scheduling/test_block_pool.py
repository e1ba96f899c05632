"""Law 4: the pool never leaks."""

import random

import pytest

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


@pytest.mark.parametrize("seed", range(2))
def test_every_block_is_free_or_held_as_counted_after_random_operations(seed: int) -> None:
    """Law 4, on the pool alone: 10^5 operations against a model of two plain containers."""
    random_ = random.Random(seed)
    num_blocks = 23
    pool = BlockPool(num_blocks)
    free, held = list(range(num_blocks)), dict.fromkeys(range(num_blocks), 0)
    for _ in range(100_000):
        operation = random_.randrange(4)
        block = random_.randrange(num_blocks)
        if operation == 0 and free:
            assert pool.take() == free[0]
            held[free.pop(0)] = 1
        elif operation == 1:
            pool.hold(block)
            if not held[block]:
                free.remove(block)
            held[block] += 1
        elif held[block]:
            is_worth_keeping = bool(random_.randrange(2))
            pool.release(block, is_worth_keeping)
            held[block] -= 1
            if not held[block]:
                free.insert(len(free) if is_worth_keeping else 0, block)
        assert pool.num_free == len(free)
        assert pool.num_holders(block) == held[block]
    assert pool.free_blocks() == free


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
