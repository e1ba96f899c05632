"""How many tokens are multiplied by int4 weights: by tiles, or where a device has no `wgmma`, by a weight widened as a
whole.

Pure data, as launch.py.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

from kernels.launch import Grid, Sizes
from kernels.linear.gpu import INT4_PARTS
from kernels.linear.launch import LinearShape, Tiles, int4_format, num_programs
from kernels.linear.tiles import MEASURED_SMS
from kernels.variant import Boxes, Constant, KernelVariant, integer, pointer
from shared.arch import Arch

# int4 steps of more rows are faster widened once and multiplied by the library, where there is no `wgmma`.
MOST_FUSED_INT4_ROWS = 256
# The same tiles serve all steps of more rows.
MOST_CHOSEN_INT4_ROWS = 2048

# Columns of a group that a step of `many_int4` multiplies, at most: a row of x's box of 128 bytes.
_MANY_INT4_PART = 64


def many_int4(shape: LinearShape, arch: Arch, tiles: Tiles, block_m: int) -> KernelVariant:
    """The variant for tiles of `block_m` of many tokens, nothing riding on it; needs `wgmma`.

    Its last argument is the number of tokens.
    """
    assert tiles.stages > 1, f"a place is told empty a product late: {tiles}"
    part, chunks = _part(shape), -(-shape.k // (INT4_PARTS * shape.group_size))
    constants: dict[str, Constant] = {
        "N": shape.n, "K": shape.k, "GROUP": shape.group_size, "PART": part,
        "BLOCK_M": block_m, "BLOCK_N": tiles.block_n, "SPLIT_K": tiles.split_k,
        "STAGES": tiles.stages, "PDL": arch.has_pdl,
    }  # fmt: skip
    if not shape.has_bias:
        constants |= {"bias": None}
    if tiles.split_k == 1:
        constants |= {"partial": None, "counters": None}
    rows_of_x = Boxes("num_tokens", shape.k, (block_m, part), 2 * part)
    words = Boxes(shape.n, chunks * shape.group_size, (tiles.block_n, part), 2 * part)
    groups = Boxes(chunks * shape.n, INT4_PARTS, (tiles.block_n, INT4_PARTS), 0)
    every = (
        replace(pointer("x", shape.dtype), boxes=rows_of_x),
        replace(pointer("weight", "i16"), boxes=words),
        replace(pointer("scale", "i32"), boxes=groups),
        pointer("bias", shape.dtype),
        pointer("out", shape.dtype),
        pointer("partial", "fp32"),
        pointer("counters", "i32"),
        integer("num_tokens"),
    )
    return KernelVariant(
        op="linear",
        kernel="linear_many_int4",
        arguments=tuple(a for a in every if a.name not in constants),
        constants=tuple(constants.items()),
        num_warps=tiles.num_warps,
        num_stages=tiles.stages,
        has_pdl=arch.has_pdl,
    )


def many_int4_grid(
    shape: LinearShape, tiles: Tiles, block_m: int, field: str
) -> Callable[[Sizes], Grid]:
    """Tiles of as many tokens as `field` of a step says, and splits of K."""
    programs = num_programs(shape, tiles)
    return lambda sizes: (-(-int(getattr(sizes, field)) // block_m) * programs, tiles.split_k, 1)


def chosen_int4_grid(
    shape: LinearShape, tiles: Tiles, block_m: int, field: str
) -> Callable[[Sizes], Grid]:
    """`many_int4_grid` in steps that are cut so; in others nothing."""
    grid, last = many_int4_grid(shape, tiles, block_m, field), MOST_CHOSEN_INT4_ROWS // 128 + 1
    way = tiles, block_m
    mine = {n for n in range(1, last + 1) if many_int4_tiles(shape, 128 * n) == way}

    def chosen(sizes: Sizes) -> Grid:
        blocks = -(-int(getattr(sizes, field)) // 128)
        return grid(sizes) if min(blocks, last) in mine else (0, 0, 0)

    return chosen


def takes_wgmma(shape: LinearShape, arch: Arch) -> bool:
    """Claims that `many_int4` multiplies many tokens."""
    is_int4 = shape.layout == "int4_group" and shape.dtype == shape.out_dtype == "bf16"
    return is_int4 and arch.has_wgmma


@cache  # layers have equal shapes
def many_int4_tiles(shape: LinearShape, tokens: int) -> tuple[Tiles, int]:
    """How a step of so many rows, or up to 127 fewer, is cut, and the tokens of a tile: of 128 or 256 tokens, whichever
    end soonest on the device that was measured on. K is split where tiles of 128 would leave half of it idle."""
    part, block_k = _part(shape), INT4_PARTS * shape.group_size
    # Places of x's ring: 160 KiB of shared memory.
    half_size = Tiles(128, block_k, 8, prefetch=0, stages=5 * 2 * 64 // part), 128
    whole = Tiles(128, block_k, 8, prefetch=0, stages=5 * 64 // part), 256

    if tokens > MOST_CHOSEN_INT4_ROWS:
        return whole

    def num_tiles(way: tuple[Tiles, int]) -> int:
        return num_programs(shape, way[0]) * -(-tokens // way[1])

    # A tile's time beside the other's.
    times = {half_size: 3, whole: 5}
    best = min(times, key=lambda way: times[way] * -(-num_tiles(way) // MEASURED_SMS))
    if best != half_size:
        return best
    steps = -(-shape.k // block_k) * shape.group_size // part
    split_k = 1
    while (
        2 * num_tiles(best) * split_k <= MEASURED_SMS
        and steps % (2 * split_k) == 0
        and steps // split_k >= 16
    ):
        split_k *= 2
    return replace(best[0], split_k=split_k), best[1]


def many_int4_ways(shape: LinearShape) -> dict[tuple[Tiles, int], int]:
    """All that `many_int4_tiles` chooses, each with the most rows that it takes it for, as far as rows matter."""
    tokens = range(128, MOST_CHOSEN_INT4_ROWS + 129, 128)
    return {many_int4_tiles(shape, most): most for most in tokens}


def _part(shape: LinearShape) -> int:
    return min(shape.group_size, _MANY_INT4_PART)


DENSE_BLOCK_N = 32


def dense_int4(shape: LinearShape, arch: Arch) -> KernelVariant:
    """The variant that writes a weight's values; its grid: chunks of K, blocks of rows."""
    constants: dict[str, Constant] = {
        "N": shape.n, "K": shape.k, "GROUP": shape.group_size, "BLOCK_N": DENSE_BLOCK_N,
        "FORMAT": int4_format(shape), "PDL": arch.has_pdl,
    }  # fmt: skip
    return KernelVariant(
        op="linear",
        kernel="dense_int4",
        arguments=(pointer("weight", "i16"), pointer("scale", "i32"), pointer("out", shape.dtype)),
        constants=tuple(constants.items()),
        has_pdl=arch.has_pdl,
    )


def dense_int4_grid(shape: LinearShape) -> Grid:
    """Chunks of K, and blocks of rows."""
    return -(-shape.k // (INT4_PARTS * shape.group_size)), -(-shape.n // DENSE_BLOCK_N), 1
