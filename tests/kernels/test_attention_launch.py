"""How attention is cut into tiles, on arches with much shared memory and with little."""

import pytest

from kernels.attention.candidates import candidates
from kernels.attention.launch import (
    AttentionShape,
    apart_tiles,
    decode_tiles,
    further_programs,
    prefill_tiles,
)
from kernels.regimes import REGIMES
from shared.arch import ARCHES, Arch


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("arch", [a for a in ARCHES.values() if a.is_gpu], ids=lambda a: a.name)
def test_prompt_tiles_fit_into_shared_memory_whatever_the_heads(
    arch: object, head_dim: int
) -> None:
    shape = AttentionShape(32, 8, head_dim, 0.1, 0, 0.0, "bf16", "bf16", 16)
    tiles = prefill_tiles(shape, arch)  # type: ignore[arg-type]
    rows = tiles.block_q * shape.group
    assert rows == 64
    # Queries, and a tile of keys and one of values for each stage.
    used = (rows + 2 * tiles.stages * tiles.block_n) * head_dim * 2
    assert used <= arch.max_shared_bytes  # type: ignore[attr-defined]


def test_groups_larger_than_a_tile_still_have_one_query() -> None:
    shape = AttentionShape(128, 1, 128, 0.1, 0, 0.0, "bf16", "bf16", 16)
    assert prefill_tiles(shape, ARCHES["sm_90"]).block_q == 1


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("arch", [a for a in ARCHES.values() if a.is_gpu], ids=lambda a: a.name)
def test_tiles_of_prompts_over_codes_fit_into_shared_memory(arch: Arch, head_dim: int) -> None:
    """128 rows where there is room, else 64."""
    shape = AttentionShape(32, 8, head_dim, 0.1, 0, 0.0, "bf16", "fp8e4nv", 16)
    tiles = apart_tiles(shape, arch)
    rows = tiles.block_q * shape.group
    assert rows == (128 if (128 + 6 * 64) * head_dim * 2 <= arch.max_shared_bytes else 64)
    used = (rows + 2 * tiles.stages * tiles.block_n) * head_dim * 2
    assert used <= arch.max_shared_bytes


@pytest.mark.parametrize("kv_dtype", ["bf16", "fp8e4nv"])
@pytest.mark.parametrize("most", [1, 2, 512])
def test_decode_is_cut_smaller_only_where_shared_memory_is_scarce(most: int, kv_dtype: str) -> None:
    wide, usual = (
        AttentionShape(32, 8, head_dim, 0.1, 0, 0.0, "bf16", kv_dtype, 16)
        for head_dim in (256, 128)
    )
    little, much = ARCHES["sm_86"], ARCHES["sm_90"]
    assert decode_tiles(usual, little, most) == decode_tiles(usual, much, most)
    tiles = decode_tiles(wide, little, most)
    assert tiles.extra == decode_tiles(wide, much, most).extra
    loaded = 2 * (tiles.stages - 1) * tiles.block_n * 256 * (1 if wide.is_scaled else 2)
    assert 2 * 16 * 256 + loaded <= little.max_shared_bytes


@pytest.mark.parametrize("kv_dtype", ["bf16", "i8"])
@pytest.mark.parametrize("kv_heads", [1, 3, 8])
def test_every_way_has_a_program_for_each_part_that_is_dealt_out(
    kv_heads: int, kv_dtype: str
) -> None:
    """But for one sequence alone, to which nothing is dealt out."""
    shape = AttentionShape(24, kv_heads, 64, 0.1, 0, 0.0, "bf16", kv_dtype, 16)
    most = further_programs(shape)
    for regime in REGIMES:
        for tiles in candidates(shape, ARCHES["sm_90"], regime.max_sequences).values():
            assert tiles.is_lone == (regime.max_sequences == 1)
            assert tiles.is_lone or tiles.extra == most
