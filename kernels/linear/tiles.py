"""How a linear's work is cut where no tuning table says otherwise, by shape, number of tokens and shared memory.

Measured, not reckoned: docs/BENCHMARKS.md has the numbers. Pure data, as launch.py.
"""

from dataclasses import replace

from kernels.launch import power_of_two
from kernels.linear.gpu import INT4_PARTS
from kernels.linear.launch import LinearShape, Tiles, num_programs, uses_mma
from shared.arch import Arch

MAX_BLOCK_M = 64

# Streaming multiprocessors of H100 and H200, on which all choices were measured: the work is cut so that these are
# busy. What devices of more or fewer want is among the candidates (candidates.py), and tuning finds it.
MEASURED_SMS = 132
# Few tokens' products need no more: about one for each of those.
_ENOUGH_PROGRAMS = 128


def built_in_tiles(shape: LinearShape, arch: Arch, max_tokens: int) -> tuple[Tiles, int]:
    """How the work is cut where no table says otherwise, and the tokens of a tile; 1 is the kernel for one token.

    Args:
        max_tokens: of a step, as `Regime` has it.
    """
    if max_tokens == 1:
        block_m = one_token_block_m(shape)
        if block_m == 1:
            return one_token_tiles(shape, arch), 1
        return few_tokens_tiles(shape, arch, block_m), block_m
    if max_tokens == 0 and (shape.activations or shape.layout == "int4_group"):
        return many_tokens_tiles(shape, arch)
    block_m = few_tokens_block_m(shape, arch, max_tokens or MAX_BLOCK_M)
    return few_tokens_tiles(shape, arch, block_m), block_m


def one_token_tiles(shape: LinearShape, arch: Arch) -> Tiles:
    """The shipped choice; measured on one H100 in whole steps (docs/BENCHMARKS.md)."""
    if shape.layout == "int4_group":
        return _one_int4_tiles(shape, arch)
    is_wide = shape.num_outputs >= 8192
    if shape.layout == "plain":
        if is_wide and shape.epilogue != "plain" and shape.k <= 2048:
            wanted = Tiles(2, 1024, num_warps=1)
        elif is_wide:
            wanted = Tiles(2, 2048, num_warps=8)
        elif shape.epilogue != "plain":
            wanted = Tiles(1, 1024, num_warps=2 if shape.k <= 2048 else 1)
        elif shape.k > 8192:
            wanted = Tiles(4, 2048, num_warps=8, prefetch=2)
        elif shape.k > 4096:
            wanted = Tiles(4, 2048, num_warps=4)
        elif shape.k > 2048:
            wanted = Tiles(4, 1024, num_warps=2)
        else:  # all of it is loaded before the wait
            wanted = Tiles(4, 2048, num_warps=4)
    elif is_wide:
        wanted = Tiles(2, 2048, num_warps=4)
    elif shape.k > 8192:
        wanted = Tiles(4, 2048, num_warps=8, prefetch=2, vector=8)
    else:
        wanted = Tiles(4, 512, num_warps=2, prefetch=2, vector=8)
    block_k = _block_k(shape.k, wanted.block_k)
    if block_k < wanted.block_k and block_k < 1024 and wanted.block_n > 1:
        # K is a small power of two times an odd number, as in Llama 2 and Qwen 2.5: in blocks that divide it threads
        # would have a value or two of each row to load at a time.
        if wanted.block_n == 4:
            return replace(wanted, block_k=min(1024, power_of_two(shape.k)), num_warps=4)
        return replace(wanted, block_k=max(512, block_k), num_warps=2)
    return replace(wanted, block_k=block_k)


def few_tokens_tiles(shape: LinearShape, arch: Arch, block_m: int) -> Tiles:
    """The shipped choice; measured on one H200 (docs/BENCHMARKS.md), then fitted to the arch's shared memory."""
    if shape.layout == "int4_group":
        return _few_int4_tiles(shape, arch, block_m)
    if shape.activations:
        wanted = Tiles(64, 256, 4, prefetch=0, stages=4)
    elif shape.layout == "plain":
        wanted = Tiles(64, 128, 4, stages=4)
    else:
        wanted = Tiles(64, 256, 4, stages=3)
    width = 1 if shape.epilogue == "plain" else 2
    weight_bytes = 1 if shape.layout != "plain" else 4 if shape.dtype == "fp32" else 2
    row_bytes = width * wanted.block_n * weight_bytes + 2 * block_m
    block_k = _block_k(shape.k, wanted.block_k)

    def stages() -> int:
        # The tile that is loaded before the wait takes the place of one more stage.
        return arch.max_shared_bytes // (row_bytes * block_k) - 1

    while stages() < 2 and block_k > 32:
        block_k //= 2
    # A program for each SM, each with several chunks of K.
    split_k, programs = 1, num_programs(shape, wanted)
    is_split = not shape.activations or shape.k > 8192  # products of 8 bits are soon done
    while (
        is_split
        and split_k < 4
        and split_k * programs < _ENOUGH_PROGRAMS
        and shape.k >= 8 * split_k * block_k
    ):
        split_k *= 2
    return replace(
        wanted, block_k=block_k, stages=max(2, min(wanted.stages, stages())), split_k=split_k
    )


def one_token_block_m(shape: LinearShape) -> int:
    """1 where the kernel for one token serves one token best; else tokens of a tile of `few_tokens`."""
    is_slow = shape.layout == "int4_group" and not uses_mma(shape) and shape.k > 8192
    return 16 if is_slow else 1


def _one_int4_tiles(shape: LinearShape, arch: Arch) -> Tiles:
    """Measured on one H100 in a whole step."""
    block_k = INT4_PARTS * shape.group_size
    if not uses_mma(shape):  # up to 4,096 values of a row at once, a quad of 32 a thread
        block_k = max(min(power_of_two(shape.k), 4096), block_k)
        return Tiles(4, block_k, num_warps=max(1, block_k // 1024))
    # Sixteen rows, small programs: more of them, and of the next kernel's, fit a multiprocessor.
    block_n = 16 if shape.epilogue == "plain" else 8
    chunks, is_long = -(-shape.k // block_k), shape.k > 8192
    num_warps = 8 if is_long else 4
    while chunks % num_warps:
        num_warps //= 2
    stage = num_warps * (16 * (2 * shape.group_size + 4 * INT4_PARTS) + 2 * block_k)
    # So many chunks on their way, where half of a multiprocessor's memory holds them: the next kernel's has the other.
    wanted = (24 if is_long else 8) // num_warps
    stages = max(1, min(wanted, chunks // num_warps, arch.max_shared_bytes // (2 * stage)))
    return Tiles(block_n, block_k, num_warps, prefetch=0, stages=stages)


def few_tokens_block_m(shape: LinearShape, arch: Arch, most: int) -> int:
    """Tokens of a tile, of `most` at once: fewer where two stages of int4's chunks of x would not fit."""
    while most > 16 and 2 * _int4_stage_bytes(shape, 32, most) > arch.max_shared_bytes:
        most //= 2
    return most


def _few_int4_tiles(shape: LinearShape, arch: Arch, block_m: int) -> Tiles:
    """Measured on one H100 for groups of 64."""
    is_wide, block_k = shape.num_outputs >= 8192, INT4_PARTS * shape.group_size
    if block_m == 16:
        wanted = Tiles(32, block_k, 2, 1, 4) if is_wide else Tiles(64, block_k, 4, 0, 4, 4)
    elif block_m == 32:
        wanted = Tiles(128, block_k, 8, 0, 3) if is_wide else Tiles(64, block_k, 4, 0, 3, 4)
    else:
        wanted = Tiles(128, block_k, 8, 1, 3) if is_wide else Tiles(64, block_k, 4, 1, 3, 2)
    return _fitting_int4_tiles(shape, arch, wanted, block_m)


def _fitting_int4_tiles(shape: LinearShape, arch: Arch, wanted: Tiles, block_m: int) -> Tiles:
    """Fewer rows, then fewer stages, where shared memory is scarce; no split of K that is empty."""

    def fits(tiles: Tiles) -> int:
        return arch.max_shared_bytes // _int4_stage_bytes(shape, tiles.block_n, block_m)

    tiles = wanted
    while tiles.block_n > 32 and fits(tiles) < 2 + tiles.prefetch:
        warps = max(4, tiles.num_warps // 2)
        tiles = replace(tiles, block_n=tiles.block_n // 2, num_warps=warps, prefetch=0)
    chunks, split_k = -(-shape.k // tiles.block_k), tiles.split_k
    while split_k > 1 and (split_k - 1) * -(-chunks // split_k) >= chunks:
        split_k //= 2
    stages = max(2, min(tiles.stages, fits(tiles) - tiles.prefetch))
    return replace(tiles, stages=stages, split_k=split_k)


def _int4_stage_bytes(shape: LinearShape, block_n: int, block_m: int) -> int:
    """Shared memory of one stage: words and scales of a chunk, and x's columns."""
    width = 1 if shape.epilogue == "plain" else 2
    words = width * block_n * (2 * shape.group_size + 4 * INT4_PARTS)
    return words + 2 * INT4_PARTS * shape.group_size * block_m


def many_tokens_tiles(shape: LinearShape, arch: Arch) -> tuple[Tiles, int]:
    """The shipped choice where nothing rides on products of int4, or of 8 bits with 8 bits, and how many tokens a
    tile has; measured on one H100."""
    if shape.layout == "int4_group":
        block_m = few_tokens_block_m(shape, arch, MAX_BLOCK_M)
        wanted = Tiles(128, INT4_PARTS * shape.group_size, 8, prefetch=0, stages=3)
        return _fitting_int4_tiles(shape, arch, wanted, block_m), block_m
    is_wide = shape.n >= 8192 and arch.max_shared_bytes >= 3 * (256 + 128) * 128
    block_k = _block_k(shape.k, 128)
    return Tiles(128, block_k, 8, prefetch=0, stages=3), 256 if is_wide else 128


def _block_k(k: int, wanted: int) -> int:
    """The largest power of two up to `wanted` that divides K, so that no load is masked; where that is small,
    `wanted`, masked."""
    divisor = k & -k
    return min(wanted, divisor) if divisor >= 128 else min(wanted, power_of_two(k))
