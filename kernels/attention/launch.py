"""Which variants of the attention kernel serve a shape, and how they are launched. Pure data."""

from dataclasses import dataclass, replace
from functools import cache

from kernels.launch import Grid, Scratch, Sizes
from kernels.variant import Argument, Constant, KernelVariant, integer, pointer
from shared.arch import Arch

_MIN_DOT_ROWS = 16
# Arguments that hold the step's own keys and values.
NEW = ("k_new", "v_new")


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
    def is_scaled(self) -> bool:
        """Claims that the cache holds 8-bit codes, with a scale for each token and kv head."""
        return self.kv_dtype in ("fp8e4nv", "i8")

    @property
    def group(self) -> int:
        """Query heads that share a kv head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True, slots=True)
class AttentionTiles:
    """How the work is cut: query tokens and keys of a tile, parts that a sequence's keys are cut into.

    `is_decode`: a tile is a sequence with one query token. `min_split`: fewest keys worth a split. `takes`: which
    sequences are attended to, "all", those with "one" query token, or those with "several". `reads_new`: keys and
    values of the step's own tokens are read as values, not as codes.
    """

    block_q: int
    block_n: int
    splits: int
    num_warps: int = 4
    stages: int = 2
    is_decode: bool = False
    min_split: int = 128
    takes: str = "all"
    reads_new: bool = False

    @property
    def reads_query_start(self) -> bool:
        """Claims that a sequence's queries must be looked up."""
        return not self.is_decode or self.takes == "one"


def decode_tiles(shape: AttentionShape, arch: Arch, max_sequences: int) -> AttentionTiles:
    """One query token a tile; measured on one H100 (docs/BENCHMARKS.md), then fitted to the arch's shared memory."""
    tiles = _measured_decode_tiles(shape, max_sequences)
    while _decode_bytes(shape, tiles) > arch.max_shared_bytes and tiles.block_n > 16:
        if tiles.stages > 2:
            tiles = replace(tiles, stages=tiles.stages - 1)
        else:
            tiles = replace(tiles, block_n=tiles.block_n // 2)
    return tiles


def _measured_decode_tiles(shape: AttentionShape, max_sequences: int) -> AttentionTiles:
    """Few sequences are split so that they still fill a device of about 132 SMs; many need no split. Codes take time to
    widen: more programs, or more of their warps, share it.
    """
    most, programs = (32, 1024) if shape.is_scaled else (16, 256)
    splits = 1
    while splits < most and splits * max_sequences * shape.num_kv_heads < programs:
        splits *= 2
    if splits == 1 and not shape.is_scaled:
        if max_sequences <= 64 and shape.head_dim <= 64:
            return AttentionTiles(1, 64, 1, num_warps=2, stages=4, is_decode=True)
        # One warp each keeps most loads in flight.
        return AttentionTiles(1, 32, 1, num_warps=1, stages=4, is_decode=True)
    if splits >= 16 and shape.is_scaled and shape.head_dim <= 128:
        return AttentionTiles(1, 128, splits, num_warps=4, stages=2, is_decode=True, min_split=64)
    if max_sequences == 1 and not shape.is_scaled and shape.head_dim <= 128:
        # The first tile is loaded before the wait, so that a large one costs little, and every part less shortens
        # what comes after it.
        block_n = 256 if shape.head_dim <= 64 else 128
        return AttentionTiles(1, block_n, splits, 8, stages=2, is_decode=True, min_split=block_n)
    # One sequence leaves most of a device to the next linear's programs, which load their weights meanwhile: a third
    # stage's shared memory keeps them out, and costs 5 us a layer.
    stages = 2 if max_sequences == 1 else 3
    return AttentionTiles(1, 64, splits, num_warps=2, stages=stages, is_decode=True, min_split=64)


def _decode_bytes(shape: AttentionShape, tiles: AttentionTiles) -> int:
    """Shared memory of a tile: queries, probabilities, and keys and values of all stages but one, in 16 bits, or in
    codes, which are widened there."""
    rows, columns = _rows(shape, tiles), block_d(shape)
    value_bytes = 1 if shape.is_scaled else 2
    loaded = 2 * (tiles.stages - 1) * tiles.block_n * columns * value_bytes
    return 2 * rows * (columns + tiles.block_n) + loaded


def prefill_tiles(shape: AttentionShape, arch: Arch) -> AttentionTiles:
    """Tiles of 64 rows, no splits: one warp group each, so that a neighbour's products fill the time of a softmax.

    Three stages where shared memory holds the queries and three tiles of keys and values; of codes two, as they are
    widened into shared memory besides.
    """
    rows, block_n = 64, 64 if shape.head_dim <= 128 else 32
    row_bytes = 2 * block_d(shape)
    fits = (rows + 3 * 2 * block_n) * row_bytes <= arch.max_shared_bytes
    stages = 3 if fits and not shape.is_scaled else 2
    return AttentionTiles(max(1, rows // shape.group), block_n, 1, stages=stages)


def apart_tiles(shape: AttentionShape, arch: Arch) -> AttentionTiles:
    """Tiles for sequences with several queries alone, over codes.

    As no lone query fills a tile, it has 128 rows where shared memory holds them and three tiles of keys and values.
    """
    rows, block_n = 128, 64
    if (rows + 3 * 2 * block_n) * 2 * block_d(shape) <= arch.max_shared_bytes:
        tiles = AttentionTiles(max(1, rows // shape.group), block_n, 1, num_warps=8, stages=3)
    else:
        tiles = prefill_tiles(shape, arch)
    return replace(tiles, takes="several", reads_new=True)


@cache  # layers have equal shapes
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
        "BLOCK_D": block_d(shape),
        "BLOCK_N": tiles.block_n,
        "SPLITS": tiles.splits,
        "MIN_SPLIT": tiles.min_split,
        "CODES": _codes(shape, arch),
        "STAGES": tiles.stages,
        "TAKES": tiles.takes,
        "PDL": arch.has_pdl,
    }
    arguments = [
        pointer("q", shape.dtype),
        *_cache_arguments(shape),
        *(pointer(name, shape.dtype) for name in NEW if tiles.reads_new),
        pointer("block_tables", "i32"),
        pointer("seq_lens", "i32"),
        *((pointer("query_start", "i32"),) if tiles.reads_query_start else ()),
        pointer("out", shape.dtype),
    ]
    if not tiles.reads_query_start:
        constants |= {"query_start": None}
    if not tiles.reads_new:
        constants |= dict.fromkeys(NEW)
    if not shape.is_scaled:
        constants |= {"k_scale": None, "v_scale": None}
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
    """Programs: query tiles, kv heads, splits; kv heads first where each query tile is one query."""
    count = num_tiles(tiles, sizes)
    if tiles.is_decode:
        return shape.num_kv_heads, count, tiles.splits
    return count, shape.num_kv_heads, tiles.splits


def scratch(shape: AttentionShape, tiles: AttentionTiles) -> tuple[Scratch, ...]:
    """Memory for partial results: sums, maxima, weights and counters, in the kernel's order."""
    if tiles.splits == 1:
        return ()
    rows = _power_of_two(tiles.block_q * shape.group)
    columns = block_d(shape)

    def programs(sizes: Sizes) -> int:
        return num_tiles(tiles, sizes) * shape.num_kv_heads

    def per_row(sizes: Sizes) -> int:
        return programs(sizes) * tiles.splits * rows * 4

    return (
        Scratch("attention_partial", lambda sizes: per_row(sizes) * columns),
        Scratch("attention_max", per_row),
        Scratch("attention_sum", per_row),
        Scratch("attention_counters", lambda sizes: programs(sizes) * 4),
    )


def _cache_arguments(shape: AttentionShape) -> list[Argument]:
    # Codes are read in pairs: what moves and transposes tiles for tensor cores knows 16 bits.
    stored = "u16" if shape.is_scaled else shape.kv_dtype
    arguments = [pointer("k_cache", stored), pointer("v_cache", stored)]
    if shape.is_scaled:
        arguments += [pointer("k_scale", "fp32"), pointer("v_scale", "fp32")]
    return arguments


def _codes(shape: AttentionShape, arch: Arch) -> str:
    """How the kernel widens what the cache holds."""
    if not shape.is_scaled:
        return ""
    if shape.kv_dtype == "i8":
        return "int8"
    return "e4m3" if arch.has_fp8 else "e4m3_bits"


def block_d(shape: AttentionShape) -> int:
    """Columns of a tile: tensor cores multiply no less than 16, and pairs have half of them."""
    return max(32 if shape.is_scaled else 16, _power_of_two(shape.head_dim))


def _rows(shape: AttentionShape, tiles: AttentionTiles) -> int:
    rows = tiles.block_q * shape.group
    return max(_MIN_DOT_ROWS, _power_of_two(rows))


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
