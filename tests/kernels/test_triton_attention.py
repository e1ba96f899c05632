"""Law 2 on the CPU: the attention kernel equals its formula, through Triton's interpreter."""

import pytest

from kernels.attention.launch import AttentionShape, AttentionTiles
from kernels.attention.shares import Shares
from tests.kernels.attention_cases import (
    DECODE_LENGTHS,
    RAGGED_LENGTHS,
    attention_shape,
    check_attention,
)
from tests.kernels.interpreted import INTERPRETER, run


def _check(
    shape: AttentionShape, tiles: AttentionTiles, lengths: list[tuple[int, int]], seed: int
) -> None:
    check_attention(run, INTERPRETER, shape, tiles, lengths, seed)


@pytest.mark.parametrize("extra", [0, 6, 40])
@pytest.mark.parametrize(("window", "soft_cap"), [(0, 0.0), (37, 0.0), (0, 2.5)])
def test_decode_equals_formula(extra: int, window: int, soft_cap: float) -> None:
    """A sequence of length 0 is padding and is left alone."""
    tiles = AttentionTiles(1, 16, extra, min_part=32, is_decode=True, is_early=extra == 40)
    _check(attention_shape(window, soft_cap), tiles, DECODE_LENGTHS, seed=extra)


@pytest.mark.parametrize("length", [1, 32, 33, 128, 129, 700])
def test_parts_of_a_lone_sequence_are_combined_few_or_many(length: int) -> None:
    """One part, one of a newest key alone, up to four of sixteen, and more."""
    tiles = AttentionTiles(1, 16, 15, min_part=32, is_decode=True, is_lone=True, is_early=True)
    _check(attention_shape(), tiles, [(1, length)], seed=5)


def test_long_sequences_among_short_ones_take_the_further_parts() -> None:
    """More parts than are combined at a time, and a sequence of none between those that have them."""
    lengths = [(1, 90), (1, 1900), (1, 0), (1, 30), (1, 2600), (1, 64)]
    tiles = AttentionTiles(1, 16, 40, num_warps=1, is_decode=True)
    _check(attention_shape(head_dim=64), tiles, lengths, seed=6)


@pytest.mark.parametrize(("window", "soft_cap"), [(0, 0.0), (9, 0.0), (0, 2.5)])
def test_ragged_step_equals_formula(window: int, soft_cap: float) -> None:
    """Prompt chunks, whole prompts and single tokens share a step."""
    _check(attention_shape(window, soft_cap), AttentionTiles(4, 16), RAGGED_LENGTHS, seed=window)


@pytest.mark.parametrize("extra", [3, 16, 90])
@pytest.mark.parametrize("window", [0, 150])
def test_parts_of_ragged_step_equal_formula(extra: int, window: int) -> None:
    """Tiles of one sequence have as many parts each; a lone query's and a chunk's tiles are cut alike."""
    lengths = [(3, 290), (1, 5), (7, 400), (1, 900), (2, 2), (20, 20)]
    _check(attention_shape(window), AttentionTiles(2, 16, extra, min_part=32), lengths, seed=1)


@pytest.mark.parametrize("head_dim", [8, 24, 64])
def test_parts_of_wide_tiles_are_combined_a_few_columns_at_a_time(head_dim: int) -> None:
    """More rows than a lone query's, most of them filled by none, as in every engine's steps with prompts."""
    lengths = [(9, 200), (1, 300), (20, 20)]
    _check(
        attention_shape(head_dim=head_dim), AttentionTiles(8, 16, 20, min_part=32), lengths, seed=3
    )


@pytest.mark.parametrize("shares", [Shares(9, 1), Shares(20, 16), Shares(3, 4)])
def test_parts_may_be_dealt_out_for_other_tiles_and_fewer_programs(shares: Shares) -> None:
    """Layers differ in heads: the host deals out what all of them take."""
    lengths = [(3, 290), (1, 5), (7, 400), (1, 900), (20, 20)]
    tiles = AttentionTiles(4, 16, 20, min_part=32)
    check_attention(run, INTERPRETER, attention_shape(), tiles, lengths, seed=7, shares=shares)


def test_lone_queries_beside_prompts_over_codes_begin_early() -> None:
    """As where there is one kv head: a launch of its own, dealt out as if the others were not there."""
    shape = attention_shape(kv_dtype="fp8e4nv")
    alone = AttentionTiles(1, 16, 12, min_part=16, is_decode=True, takes="one", is_early=True)
    prompts = AttentionTiles(4, 16, takes="several", reads_new=True)
    check_attention(
        run, INTERPRETER, shape, alone, [(1, 300), (13, 13), (1, 1), (5, 33)], seed=4,
        others=(prompts,), shares=Shares(12, 4, apart_beyond=16),
    )  # fmt: skip


def test_one_query_head_per_kv_head() -> None:
    shape = attention_shape(heads=2, head_dim=16)
    _check(shape, AttentionTiles(8, 16), [(11, 11), (1, 30)], seed=2)


@pytest.mark.parametrize("kv_dtype", ["fp8e4nv", "i8"])
@pytest.mark.parametrize("extra", [0, 6, 40])
@pytest.mark.parametrize(("window", "soft_cap"), [(0, 0.0), (37, 0.0), (0, 2.5)])
def test_decode_over_eight_bit_cache_equals_formula(
    kv_dtype: str, extra: int, window: int, soft_cap: float
) -> None:
    """The formula reads the same codes: what is left is rounding inside the kernel."""
    tiles = AttentionTiles(1, 16, extra, min_part=32, is_decode=True, is_early=extra == 40)
    shape = attention_shape(window, soft_cap, kv_dtype=kv_dtype)
    _check(shape, tiles, DECODE_LENGTHS, seed=extra)


@pytest.mark.parametrize("kv_dtype", ["fp8e4nv", "i8"])
@pytest.mark.parametrize(("window", "soft_cap"), [(0, 0.0), (9, 0.0), (0, 2.5)])
def test_ragged_step_over_eight_bit_cache_equals_formula(
    kv_dtype: str, window: int, soft_cap: float
) -> None:
    shape = attention_shape(window, soft_cap, kv_dtype=kv_dtype)
    _check(shape, AttentionTiles(4, 16), RAGGED_LENGTHS, seed=window)


@pytest.mark.parametrize("kv_dtype", ["fp16", "fp8e4nv"])
@pytest.mark.parametrize("lengths", [RAGGED_LENGTHS, DECODE_LENGTHS, [(13, 13), (5, 33)]])
def test_step_in_two_launches_equals_formula(kv_dtype: str, lengths: list[tuple[int, int]]) -> None:
    """Sequences with one query and those with several, each by a kernel of its own: no query is left out."""
    shape = attention_shape(kv_dtype=kv_dtype)
    decode = AttentionTiles(1, 16, 8, min_part=16, is_decode=True, takes="one")
    prompts = AttentionTiles(4, 16, takes="several")
    check_attention(run, INTERPRETER, shape, decode, lengths, seed=4, others=(prompts,))


@pytest.mark.parametrize("kv_dtype", ["fp8e4nv", "i8"])
@pytest.mark.parametrize(("window", "soft_cap"), [(0, 0.0), (9, 0.0), (37, 0.0), (0, 2.5)])
def test_own_tokens_read_as_values_equal_formula(
    kv_dtype: str, window: int, soft_cap: float
) -> None:
    """Whole prompts, and chunks whose earlier tokens are codes: beyond the window, in it, and a part of a tile."""
    shape = attention_shape(window, soft_cap, kv_dtype=kv_dtype)
    tiles = AttentionTiles(4, 16, reads_new=True)
    lengths = [*RAGGED_LENGTHS, (40, 40), (20, 52), (3, 100)]
    _check(shape, tiles, lengths, seed=window)


@pytest.mark.parametrize("kv_dtype", ["fp16", "fp8e4nv", "i8"])
def test_error_does_not_grow_with_the_context(kv_dtype: str) -> None:
    """32,768 tokens, as a share of a mean that is 180 times smaller than a value: sums are fp32 from end to end."""
    shape = attention_shape(heads=4, head_dim=32, kv_dtype=kv_dtype)
    tiles = AttentionTiles(1, 128, 8, is_decode=True)
    _check(shape, tiles, [(1, 32768), (1, 64)], seed=3)
