"""The ways in which attention's work can be cut, by name, the built-in choice first: what tuning chooses from.

They are few, as every engine holds them: what was near the best on an H100 for one head size or batch
(docs/BENCHMARKS.md). None shares keys out in another way: that would be faster at the lengths that are measured and
slow at others. None takes more rows of a prompt at once: such tiles win on prompts
alone and lose where decode rides along. Pure data.
"""

from dataclasses import replace

from kernels.attention.launch import (
    AttentionShape,
    AttentionTiles,
    apart_tiles,
    block_d,
    decode_tiles,
    prefill_tiles,
)
from kernels.tuning import Site
from shared.arch import Arch


def candidates(
    shape: AttentionShape, arch: Arch, max_sequences: int, *, is_apart: bool = False
) -> dict[str, AttentionTiles]:
    """Tiles by name.

    Args:
        max_sequences: of a step that decodes, as `Regime` has it; 0: any step.
        is_apart: of any step, those sequences that have several queries.
    """
    if max_sequences:
        first = decode_tiles(shape, arch, max_sequences)
        others = _for_decode(shape, first)
    else:
        first = apart_tiles(shape, arch) if is_apart else prefill_tiles(shape, arch)
        others = [replace(first, stages=5 - first.stages), replace(first, block_n=32)]
    fitting = [tiles for tiles in others if _fits(shape, arch, tiles)]
    return {_name(tiles): tiles for tiles in (first, *fitting)}


def site(shape: AttentionShape, max_tokens: int, max_sequences: int) -> Site:
    """Where the choice is made."""
    return Site(
        op="attention",
        tokens=0 if max_sequences else max_tokens,
        sequences=max_sequences,
        n=shape.num_heads * shape.head_dim,
        k=shape.num_kv_heads * shape.head_dim,
        dtype=shape.kv_dtype,
        layout=f"d{shape.head_dim}",
        rides=f"window-{shape.window}" if shape.window else "",
    )


def _for_decode(shape: AttentionShape, first: AttentionTiles) -> list[AttentionTiles]:
    if shape.is_scaled:
        stages = 3 if first.is_early else 5 - first.stages
        return [replace(first, block_n=64, num_warps=2, stages=stages)]
    if not first.is_early:
        return [
            replace(first, block_n=32, num_warps=1, stages=4),
            replace(first, block_n=64, num_warps=2, stages=2),
            replace(first, block_n=64, num_warps=2, stages=4),
        ]
    small = replace(first, block_n=64, num_warps=2)
    return [
        replace(small, stages=5 - first.stages if first.block_n == 64 else 2),
        replace(small, block_n=32, num_warps=1, stages=3),
    ]


def _name(tiles: AttentionTiles) -> str:
    """As docs/BENCHMARKS.md writes tiles: query tokens, keys, warps, stages."""
    return f"q{tiles.block_q} n{tiles.block_n} w{tiles.num_warps} s{tiles.stages}"


def _fits(shape: AttentionShape, arch: Arch, tiles: AttentionTiles) -> bool:
    """Claims that shared memory holds queries and the stages of keys and values, in 16 bits."""
    rows = max(16, tiles.block_q * shape.group)
    row_bytes = 2 * block_d(shape)
    return (rows + 2 * tiles.stages * tiles.block_n) * row_bytes <= arch.max_shared_bytes
