"""How many tokens are multiplied by int4 weights: tiles for some hundreds, beyond them a weight widened as a whole.

Pure data, as launch.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

from kernels.launch import Grid, Sizes
from kernels.linear.gpu import INT4_PARTS
from kernels.linear.launch import LinearShape, Tiles, int4_format, num_programs
from kernels.linear.tiles import MEASURED_SMS
from kernels.variant import Constant, KernelVariant, integer, pointer
from shared.arch import Arch

# int4 steps of more rows are faster widened once and multiplied by the library.
MOST_FUSED_INT4_ROWS = 256
MOST_WGMMA_INT4_ROWS = 1024

# Columns of a group that a step of `many_int4` multiplies.
_MANY_INT4_PART = 32


def many_int4(shape: LinearShape, arch: Arch, tiles: Tiles, block_m: int) -> KernelVariant:
    """The variant for tiles of `block_m` of many tokens, nothing riding on it; needs `wgmma`.

    Its last argument is the number of tokens.
    """
    constants: dict[str, Constant] = {
        "N": shape.n, "K": shape.k, "GROUP": shape.group_size, "PART": _MANY_INT4_PART,
        "BLOCK_M": block_m, "BLOCK_N": tiles.block_n, "SPLIT_K": tiles.split_k,
        "STAGES": tiles.stages, "PDL": arch.has_pdl,
    }  # fmt: skip
    if not shape.has_bias:
        constants |= {"bias": None}
    if tiles.split_k == 1:
        constants |= {"partial": None, "counters": None}
    every = (
        pointer("x", shape.dtype),
        pointer("weight", "i16"),
        pointer("scale", "i32"),
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
    """Blocks of as many tokens as `field` of a step says, blocks of the weight's rows, and splits of K."""
    programs = num_programs(shape, tiles)
    return lambda sizes: (-(-int(getattr(sizes, field)) // block_m), programs, tiles.split_k)


def takes_wgmma(shape: LinearShape, arch: Arch) -> bool:
    """Claims that `many_int4` multiplies many tokens."""
    is_int4 = shape.layout == "int4_group" and shape.dtype == shape.out_dtype == "bf16"
    return is_int4 and arch.has_wgmma


def many_int4_tiles(shape: LinearShape) -> Iterator[tuple[int, Tiles, int]]:
    """The most tokens that each choice is for, ascending, and the tokens of a tile; measured on one H100."""
    ways = [(n, _many_int4_tiles(shape, n)) for n in range(128, MOST_WGMMA_INT4_ROWS + 1, 128)]
    following = [*(way for _, way in ways[1:]), None]
    for (tokens, way), after in zip(ways, following, strict=True):
        if way != after:
            yield tokens, *way


def _many_int4_tiles(shape: LinearShape, tokens: int) -> tuple[Tiles, int]:
    """Of 256 rows, of 256 tokens, which widen half as much, or half as large: whichever end soonest on the
    device that was measured on. K is split where they would leave half of it idle."""
    block_k = INT4_PARTS * _MANY_INT4_PART
    most_rows = Tiles(256, block_k, 8, stages=4), 128
    most_tokens = Tiles(128, block_k, 8, stages=3), 256
    half_size = Tiles(128, block_k, 8, stages=5), 128

    def num_tiles(way: tuple[Tiles, int]) -> int:
        return num_programs(shape, way[0]) * -(-tokens // way[1])

    # A tile's time beside the others'.
    times = {half_size: 12, most_tokens: 19, most_rows: 20}
    best = min(times, key=lambda way: times[way] * -(-num_tiles(way) // MEASURED_SMS))
    if best != half_size:
        return best
    steps = -(-shape.k // (INT4_PARTS * shape.group_size)) * shape.group_size // _MANY_INT4_PART
    split_k = 1
    while (
        2 * num_tiles(best) * split_k <= MEASURED_SMS
        and steps % (2 * split_k) == 0
        and steps // split_k >= 32
    ):
        split_k *= 2
    return replace(best[0], split_k=split_k), best[1]


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
