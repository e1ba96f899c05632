"""Law 2 of layouts: what a GPU reads is what an engine stores, bit for bit; and how int4 work is cut."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.launch import Sizes
from kernels.linear.gpu import INT4_PARTS, arranged, stored
from kernels.linear.launch import LinearShape
from kernels.linear.launch_int4 import (
    MOST_CHOSEN_INT4_ROWS,
    chosen_int4_grid,
    many_int4_tiles,
    many_int4_ways,
)
from kernels.linear.layouts import INT4_GROUPS, LAYOUTS, pack_int4_levels
from kernels.linear.tiles import one_token_tiles
from shared.arch import ARCHES
from shared.ir import WeightSpec


def _spec(rows: int, columns: int, layout: str, group: int = 0) -> WeightSpec:
    return WeightSpec((rows, columns), ("w",), (rows,), "bfloat16", layout, group)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 40), groups=st.integers(1, 9), group=st.sampled_from(INT4_GROUPS))
def test_int4_goes_to_the_gpus_order_and_back(rows: int, groups: int, group: int) -> None:
    """Also where the groups do not fill the last chunk."""
    torch.manual_seed(rows + groups)
    spec = _spec(rows, groups * group, "int4_group", group)
    packed = LAYOUTS["int4_group"].pack(torch.randn(spec.shape), group)
    back = stored(spec, arranged(spec, packed))
    assert packed.keys() == back.keys()
    for role, tensor in packed.items():
        assert torch.equal(tensor, back[role]), role


def test_word_holds_the_same_place_of_four_groups() -> None:
    levels = torch.zeros(1, 256, dtype=torch.int8)
    for part in range(INT4_PARTS):
        levels[0, part * 64 + 5] = part + 1
    packed = pack_int4_levels(levels, torch.ones(1, 4), torch.arange(4.0)[None])
    read = arranged(_spec(1, 256, "int4_group", 64), packed)
    assert int(read["weight"][0, 5]) & 0xFFFF == 0xCBA9  # level 0 is nibble 8
    assert read["scale"].view(torch.bfloat16).view(4, 2).tolist() == [[1, z] for z in range(4)]


def test_groups_beyond_the_columns_weigh_nothing() -> None:
    spec = _spec(3, 96, "int4_group", 32)
    read = arranged(spec, LAYOUTS["int4_group"].pack(torch.randn(3, 96), 32))
    assert read["weight"].shape == (3, 32)
    assert read["scale"].shape == (1, 3, 4)
    assert bool((read["scale"][..., 3] == 0).all())


@pytest.mark.parametrize("layout", ["plain", "int8_channel", "fp8_channel"])
def test_other_layouts_are_read_as_they_are_stored(layout: str) -> None:
    spec = _spec(8, 64, layout)
    packed = LAYOUTS[layout].pack(torch.randn(8, 64), 0)
    read = arranged(spec, packed)
    assert all(read[role] is tensor for role, tensor in packed.items())


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(1, 40000), groups=st.integers(1, 300), group=st.sampled_from(INT4_GROUPS),
    tokens=st.integers(1, 2 * MOST_CHOSEN_INT4_ROWS),
)  # fmt: skip
def test_every_number_of_tokens_has_tiles_that_share_k_evenly(
    rows: int, groups: int, group: int, tokens: int
) -> None:
    """One of the ways that are launched takes the step; each split has as many steps as the others, and some."""
    shape = LinearShape(rows, groups * group, "bf16", "bf16", "int4_group", group)
    ways, sizes = many_int4_ways(shape), Sizes(tokens, tokens, tokens)
    grids = [chosen_int4_grid(shape, *way, "tokens")(sizes) for way in ways]
    assert sum(grid != (0, 0, 0) for grid in grids) == 1
    way = many_int4_tiles(shape, tokens)
    tiles = way[0]
    assert tiles.split_k == 1 or tokens <= ways[way], "memory for the splits is of so many tokens"
    steps = -(-groups // INT4_PARTS) * group // min(group, 64)
    assert steps % tiles.split_k == 0
    assert steps // tiles.split_k > 0


def test_tiles_of_256_tokens_are_taken_where_they_are_full() -> None:
    """They widen half as much; 300 tokens would fill little more than half of two of them."""
    shape = LinearShape(28672, 4096, "bf16", "bf16", "int4_group", 64)
    taken = {n: many_int4_tiles(shape, n)[1] for n in (128, 256, 300, 512, 1024, 5000)}
    assert taken == {128: 128, 256: 256, 300: 128, 512: 256, 1024: 256, 5000: 256}


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(1, 40000), groups=st.integers(1, 300), group=st.sampled_from(INT4_GROUPS),
    epilogue=st.sampled_from(("plain", "silu_mul")),
)  # fmt: skip
def test_warps_of_one_token_share_chunks_evenly(
    rows: int, groups: int, group: int, epilogue: str
) -> None:
    """The kernel masks no chunk, and its ring has no more places than a warp has chunks."""
    shape = LinearShape(
        2 * rows, groups * group, "bf16", "bf16", "int4_group", group, epilogue=epilogue
    )
    tiles = one_token_tiles(shape, ARCHES["sm_90"])
    chunks = -(-groups // INT4_PARTS)
    assert chunks % tiles.num_warps == 0
    assert 1 <= tiles.stages <= chunks // tiles.num_warps
