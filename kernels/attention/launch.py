"""Which variants of the attention kernel serve a shape, and how they are launched. Pure data."""

from dataclasses import dataclass

from kernels.launch import Grid, Scratch, Sizes
from kernels.variant import Constant, KernelVariant, integer, pointer
from shared.arch import Arch

_MIN_DOT_ROWS = 16


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What the kernel is specialized for, except tiles. dtypes are Triton's names."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int
    soft_cap: float
    dtype: str
    kv_dtype: str
    block_tokens: int

    @property
    def group(self) -> int:
        """Query heads that share a kv head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True, slots=True)
class AttentionTiles:
    """How the work is cut: query tokens and keys of a tile, parts that a sequence's keys are cut into.

    `is_decode`: every sequence has exactly one query token. `min_split`: fewest keys worth a split.
    """

    block_q: int
    block_n: int
    splits: int
    num_warps: int = 4
    stages: int = 2
    is_decode: bool = False
    min_split: int = 128


def decode_tiles(shape: AttentionShape, max_sequences: int) -> AttentionTiles:
    """One query token a tile. Few sequences are split so that they still fill a device of about 132 SMs; many need
    no split, and one warp each keeps most loads in flight."""
    splits = 1
    while splits < 16 and splits * max_sequences * shape.num_kv_heads < 256:
        splits *= 2
    if splits == 1:
        return AttentionTiles(1, 32, 1, num_warps=1, stages=4, is_decode=True)
    return AttentionTiles(1, 64, splits, num_warps=2, stages=3, is_decode=True, min_split=64)


def prefill_tiles(shape: AttentionShape, arch: Arch) -> AttentionTiles:
    """Tiles of 128 rows where shared memory allows it, no splits."""
    rows = 128 if arch.max_shared_bytes > 160_000 and shape.head_dim <= 128 else 64
    return AttentionTiles(max(1, rows // shape.group), 64 if shape.head_dim <= 128 else 32, 1)


def variant(shape: AttentionShape, arch: Arch, tiles: AttentionTiles) -> KernelVariant:
    """The compiled specialization; without splits the scratch pointers are gone."""
    constants: dict[str, Constant] = {
        "SCALE": shape.scale,
        "NUM_HEADS": shape.num_heads,
        "NUM_KV_HEADS": shape.num_kv_heads,
        "HEAD_DIM": shape.head_dim,
        "WINDOW": shape.window,
        "SOFT_CAP": shape.soft_cap,
        "BLOCK_TOKENS": shape.block_tokens,
        "BLOCK_Q": tiles.block_q,
        "ROWS": _rows(shape, tiles),
        "BLOCK_D": max(16, 1 << (shape.head_dim - 1).bit_length()),
        "BLOCK_N": tiles.block_n,
        "SPLITS": tiles.splits,
        "MIN_SPLIT": tiles.min_split,
        "STAGES": tiles.stages,
        "PDL": arch.has_pdl,
    }
    arguments = [
        pointer("q", shape.dtype),
        pointer("k_cache", shape.kv_dtype),
        pointer("v_cache", shape.kv_dtype),
        pointer("block_tables", "i32"),
        pointer("seq_lens", "i32"),
        *(() if tiles.is_decode else (pointer("query_start", "i32"),)),
        pointer("out", shape.dtype),
    ]
    if tiles.is_decode:
        constants |= {"query_start": None}
    scratch = (("partial", "fp32"), ("partial_max", "fp32"), ("partial_sum", "fp32"),
               ("counters", "i32"))  # fmt: skip
    if tiles.splits > 1:
        arguments += [pointer(name, dtype) for name, dtype in scratch]
    else:
        constants |= {name: None for name, _ in scratch}
    arguments += [integer("num_sequences"), integer("table_stride")]
    return KernelVariant(
        op="attention",
        kernel="attention",
        arguments=tuple(arguments),
        constants=tuple(constants.items()),
        num_warps=tiles.num_warps,
        num_stages=tiles.stages,
        has_pdl=arch.has_pdl,
    )


def num_tiles(tiles: AttentionTiles, sizes: Sizes) -> int:
    """Tiles along the packed tokens: an upper bound that depends on T and S alone."""
    if tiles.is_decode:
        return sizes.sequences
    return sizes.tokens // tiles.block_q + sizes.sequences


def grid(shape: AttentionShape, tiles: AttentionTiles, sizes: Sizes) -> Grid:
    """Programs: query tiles, kv heads, splits."""
    return num_tiles(tiles, sizes), shape.num_kv_heads, tiles.splits


def scratch(shape: AttentionShape, tiles: AttentionTiles) -> tuple[Scratch, ...]:
    """Memory for partial results: sums, maxima, weights and counters, in the kernel's order."""
    if tiles.splits == 1:
        return ()
    rows = _power_of_two(tiles.block_q * shape.group)
    block_d = max(16, 1 << (shape.head_dim - 1).bit_length())

    def programs(sizes: Sizes) -> int:
        return num_tiles(tiles, sizes) * shape.num_kv_heads

    def per_row(sizes: Sizes) -> int:
        return programs(sizes) * tiles.splits * rows * 4

    return (
        Scratch("attention_partial", lambda sizes: per_row(sizes) * block_d),
        Scratch("attention_max", per_row),
        Scratch("attention_sum", per_row),
        Scratch("attention_counters", lambda sizes: programs(sizes) * 4),
    )


def _rows(shape: AttentionShape, tiles: AttentionTiles) -> int:
    rows = tiles.block_q * shape.group
    return max(_MIN_DOT_ROWS, _power_of_two(rows))


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
