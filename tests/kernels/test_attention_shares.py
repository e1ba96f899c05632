"""How a step's keys are shared out among programs, over random steps."""

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from kernels.attention.launch import shares_of
from kernels.attention.shares import Shares
from shared.ir import Graph, Node

_STEPS = st.lists(
    st.tuples(st.integers(1, 5000), st.integers(0, 200_000)), min_size=1, max_size=300
)
_LONE = st.lists(st.tuples(st.just(1), st.integers(0, 200_000)), min_size=1, max_size=300)
_SHARES = st.builds(Shares, st.integers(1, 256), st.integers(1, 64))


def _node(heads: int, kv_heads: int, window: int) -> Node:
    attrs = {
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": 64,
        "scale": 0.1,
        "window": window,
    }
    return Node("attention", (), (), {}, {**attrs, "soft_cap": 0.0})


def _graph(*nodes: Node, kv_cache: str = "") -> Graph:
    config = {"dtype": "bfloat16", "kv_cache": kv_cache}
    return Graph(inputs={}, nodes=nodes, outputs=(), weights={}, config=config)


def _shared_out(shares: Shares, step: list[tuple[int, int]]) -> npt.NDArray[np.int64]:
    """`step`: query tokens of each sequence, and tokens before them."""
    counts = np.array([count for count, _ in step], np.int32)
    ends = np.array([count + before for count, before in step], np.int32)
    return shares.further_parts(counts, ends)


@given(_SHARES, _STEPS)
def test_programs_suffice_and_tiles_of_a_sequence_are_cut_alike(
    shares: Shares, step: list[tuple[int, int]]
) -> None:
    parts = _shared_out(shares, step)
    assert 0 <= parts.sum() <= shares.most
    for (count, _), further in zip(step, parts.tolist(), strict=True):
        assert further % -(-count // shares.tile_queries) == 0


@given(_SHARES, _STEPS | _LONE)
def test_no_part_is_longer_than_an_even_share_and_the_least(
    shares: Shares, step: list[tuple[int, int]]
) -> None:
    tiles = [-(-count // shares.tile_queries) for count, _ in step]
    keys = sum(each * (count + before) for each, (count, before) in zip(tiles, step, strict=True))
    least = 64 if all(count == 1 for count, _ in step) else 256
    longest = max(least, -(-keys // shares.most))
    for each, (count, before), further in zip(
        tiles, step, _shared_out(shares, step).tolist(), strict=True
    ):
        assert (count + before) / (further // each + 1) <= longest


def test_of_many_like_sequences_none_is_cut_and_a_long_one_among_them_is() -> None:
    shares = Shares(32, 16)
    assert not _shared_out(shares, [(1, 700)] * 64).any()
    parts = _shared_out(shares, [(1, 700)] * 63 + [(1, 131_071)])
    assert not parts[:-1].any()
    assert parts[-1] == 131_072 // -(-(63 * 701 + 131_072) // 32)


def test_a_step_of_nothing_is_shared_out_among_nobody() -> None:
    assert _shared_out(Shares(32, 16), []).shape == (0,)


def test_where_prompts_are_another_launchs_lone_queries_share_as_if_alone() -> None:
    lone = [(1, 700)] * 62 + [(1, 131_071)]
    apart = Shares(64, 16, apart_beyond=64)
    parts = _shared_out(apart, [*lone, (7900, 60_000)])
    assert parts.tolist() == [*_shared_out(apart, lone).tolist(), 0]
    # Fewer tokens are one launch's.
    assert _shared_out(apart, [(1, 700), (5, 4000)])[1]


def test_keys_beyond_every_layers_window_are_not_shared_out() -> None:
    windowed = Shares(32, 16, window=4096)
    assert _shared_out(windowed, [(1, 5000), (1, 100_000)]).tolist() == [15, 15]


def test_shares_fit_every_layer() -> None:
    """The fewest programs, the smallest tile, and a window only where all have one."""
    plain, windowed = _node(32, 8, 0), _node(32, 4, 64)
    assert shares_of(_graph(plain, windowed)) == Shares(32, 8)
    assert shares_of(_graph(windowed)) == Shares(64, 8, window=64)
    assert shares_of(_graph(plain, kv_cache="fp8")) == Shares(64, 16, apart_beyond=64)
