"""The ways in which a linear's work can be cut, by name, the built-in choice first: what tuning chooses from.

Each is compiled into every engine, so they are few: what was measured best for some shape or batch on some GPU, and
what another number of SMs would want. A linear that leaves the squares of its result for the norm behind it keeps the
built-in rows of a program in all of them, because the next linear is compiled for that number of parts. Pure data.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache

from kernels.linear.launch import LinearShape, Tiles, num_programs
from kernels.linear.tiles import built_in_tiles, few_tokens_tiles
from kernels.tuning import Site
from shared.arch import Arch

# For one token, by whether the epilogue pairs rows: what was best for one linear or another of Llamas of 1B and 8B on
# an H100 (docs/BENCHMARKS.md).
_ONE_PLAIN = {
    True: (Tiles(1, 1024, 1), Tiles(1, 1024, 2), Tiles(2, 1024, 1), Tiles(2, 2048, 8)),
    False: (Tiles(4, 1024, 2), Tiles(4, 2048, 4), Tiles(4, 2048, 8, prefetch=2)),
}
_ONE_BYTES = {
    True: (Tiles(1, 1024, 1, prefetch=2, vector=8), Tiles(1, 2048, 1, vector=8)),
    False: (Tiles(4, 512, 2, prefetch=2, vector=8), Tiles(4, 2048, 8, prefetch=2, vector=8)),
}
# Values of the weight that a thread holds at once.
_FEWEST_VALUES, _MOST_VALUES = 16, 128
# More programs than this fill any device without a split of K.
_MOST_SPLIT_PROGRAMS = 256


@cache  # layers have equal shapes
def candidates(shape: LinearShape, arch: Arch, max_tokens: int) -> Mapping[str, tuple[Tiles, int]]:
    """Tiles and the tokens of a tile, by name; 1 token is the kernel for one.

    Args:
        max_tokens: of a step, as `Regime` has it.
    """
    first = built_in_tiles(shape, arch, max_tokens)
    ways = [first, *_others(shape, arch, max_tokens, *first)]
    if shape.has_gain:
        ways = [way for way in ways if way[0].block_n == first[0].block_n]
    return {_name(tiles, block_m): (tiles, block_m) for tiles, block_m in ways}


def site(shape: LinearShape, max_tokens: int) -> Site:
    """Where the choice is made."""
    rides = {
        "norm": shape.num_squares > 0,
        shape.epilogue: shape.epilogue != "plain",
        "add": shape.has_gain,
        "logits": shape.has_rows,
    }
    return Site(
        op="linear",
        tokens=max_tokens,
        n=shape.n,
        k=shape.k,
        dtype=shape.activations or shape.dtype,
        layout=f"{shape.layout}-g{shape.group_size}" if shape.group_size else shape.layout,
        rides="+".join(name for name, does in rides.items() if does),
    )


def _name(tiles: Tiles, block_m: int) -> str:
    """As docs/BENCHMARKS.md writes tiles: tokens, rows, columns, warps, prefetched, stages, splits, vector."""
    t = tiles
    return (
        f"m{block_m} n{t.block_n} k{t.block_k} w{t.num_warps} p{t.prefetch} s{t.stages} "
        f"x{t.split_k} v{t.vector}"
    )


def _others(
    shape: LinearShape, arch: Arch, max_tokens: int, first: Tiles, block_m: int
) -> Iterator[tuple[Tiles, int]]:
    if max_tokens == 1:
        yield from _for_one_token(shape, arch, block_m)
    elif max_tokens == 0:
        yield first, block_m // 2
    else:
        yield from ((tiles, block_m) for tiles in _for_few_tokens(shape, first))


def _for_one_token(shape: LinearShape, arch: Arch, block_m: int) -> Iterator[tuple[Tiles, int]]:
    if shape.layout == "int4_group":
        # Of the two kernels one is faster for wide weights, the other for narrow ones, by device.
        if block_m == 1:
            yield few_tokens_tiles(shape, arch, 16), 16
        return
    is_paired = shape.epilogue != "plain"
    pool = _ONE_PLAIN if shape.layout == "plain" else _ONE_BYTES
    for tiles in pool[is_paired]:
        values = (2 if is_paired else 1) * tiles.block_n * tiles.block_k // (32 * tiles.num_warps)
        if shape.k % tiles.block_k == 0 and _FEWEST_VALUES <= values <= _MOST_VALUES:
            yield tiles, 1


def _for_few_tokens(shape: LinearShape, first: Tiles) -> Iterator[Tiles]:
    """K split half as often, where it is split, for devices of fewer SMs; else twice as often, for more."""
    if first.split_k > 1:
        yield replace(first, split_k=first.split_k // 2)
    elif (
        num_programs(shape, first) <= _MOST_SPLIT_PROGRAMS and -(-shape.k // first.block_k) % 2 == 0
    ):
        yield replace(first, split_k=2)
