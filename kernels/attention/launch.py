"""Which variants of the attention kernel serve a shape, and how they are launched. Pure data."""

from dataclasses import dataclass, replace
from functools import cache

from kernels.attention.shares import Shares
from kernels.kv_cache import kv_format
from kernels.launch import Grid, Scratch, Sizes, power_of_two
from kernels.operands import TRITON_DTYPES, integer, number
from kernels.regimes import BLOCK_TOKENS, MOST_FEW_TOKENS
from kernels.variant import Argument, Constant, KernelVariant, pointer
from kernels.variant import integer as integer_argument
from shared.arch import Arch
from shared.ir import Graph, Node

_MIN_DOT_ROWS = 16
_PROMPT_ROWS = 64
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


def shape_of(node: Node, graph: Graph, block_tokens: int = BLOCK_TOKENS) -> AttentionShape:
    """What a graph's attention asks for."""
    return AttentionShape(
        num_heads=integer(node.attrs["num_heads"]),
        num_kv_heads=integer(node.attrs["num_kv_heads"]),
        head_dim=integer(node.attrs["head_dim"]),
        scale=number(node.attrs["scale"]),
        window=integer(node.attrs["window"]),
        soft_cap=number(node.attrs["soft_cap"]),
        dtype=TRITON_DTYPES[str(graph.config["dtype"])],
        kv_dtype=TRITON_DTYPES[kv_format(graph).dtype],
        block_tokens=block_tokens,
    )


@dataclass(frozen=True, slots=True)
class AttentionTiles:
    """How the work is cut: query tokens and keys of a tile, and what takes further parts of a tile's keys.

    `extra`: programs of each kv head for further parts, which `further_parts` (shares.py) deals out to the step's
    sequences, unless it `is_lone`: the step has one sequence with one query token, and all parts are its. `min_part`:
    fewest keys of a part. `is_decode`: a tile is a sequence with one query token. `is_early`: the first keys are on
    their way before the kernel before has ended. `takes`: which sequences are attended to, "all", those with "one"
    query token, or those with "several". `reads_new`: keys and values of the step's own tokens are read as values,
    not as codes.
    """

    block_q: int
    block_n: int
    extra: int = 0
    num_warps: int = 4
    stages: int = 2
    min_part: int = 64
    is_decode: bool = False
    is_lone: bool = False
    is_early: bool = False
    takes: str = "all"
    reads_new: bool = False

    @property
    def reads_query_start(self) -> bool:
        """Claims that a sequence's queries must be looked up."""
        return not self.is_decode or self.takes == "one"

    @property
    def reads_part_start(self) -> bool:
        """Claims that further parts are dealt out."""
        return self.extra > 0 and not self.is_lone


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
    """Codes take time to widen: more programs, or more of their warps, share it."""
    if max_sequences == 1:
        return _lone_tiles(shape)
    first_parts = max_sequences * shape.num_kv_heads
    tiles = AttentionTiles(1, 64, further_programs(shape), 2, stages=3, is_decode=True)
    if shape.is_scaled:
        if first_parts <= 64 and shape.head_dim <= 128:
            return replace(tiles, block_n=128, num_warps=4, stages=2, is_early=True)
        return replace(tiles, is_early=first_parts <= 512)
    if first_parts < 256:
        return replace(tiles, is_early=True)
    if max_sequences <= 64 and shape.head_dim <= 64:
        return replace(tiles, stages=4)
    # One warp each keeps most loads in flight.
    return replace(tiles, block_n=32, num_warps=1, stages=4)


def _lone_tiles(shape: AttentionShape) -> AttentionTiles:
    """One sequence leaves most of a device to the next linear's programs, which load their weights meanwhile: a third
    stage's shared memory keeps them out, and costs 5 us a layer."""
    extra = max(1, (256 if shape.is_scaled else 128) // shape.num_kv_heads - 1)
    tiles = AttentionTiles(1, 64, extra, 2, is_decode=True, is_lone=True, is_early=True)
    if shape.is_scaled:
        return replace(tiles, block_n=128, num_warps=4) if shape.head_dim <= 128 else tiles
    if shape.head_dim > 128:
        return tiles
    # The first tile is loaded before the wait, so that a large one costs little, and every part less shortens
    # what comes after it.
    block_n = 256 if shape.head_dim <= 64 else 128
    return replace(tiles, block_n=block_n, num_warps=8, min_part=block_n)


def further_programs(shape: AttentionShape) -> int:
    """Programs of each kv head for further parts: with few sequences they are what fills a device of about 132 SMs,
    with hundreds they cost less than a microsecond a layer."""
    return -(-(512 if shape.is_scaled else 256) // shape.num_kv_heads)


def shares_of(graph: Graph) -> Shares:
    """What the kernels of all of a graph's attentions take."""
    shapes = [shape_of(node, graph) for node in graph.nodes if node.op == "attention"]
    windows = [shape.window for shape in shapes]
    return Shares(
        min(map(further_programs, shapes)),
        min(map(tile_queries, shapes)),
        window=max(windows) if all(windows) else 0,
        apart_beyond=MOST_FEW_TOKENS if any(shape.is_scaled for shape in shapes) else 0,
    )


def _decode_bytes(shape: AttentionShape, tiles: AttentionTiles) -> int:
    """Shared memory of a tile: queries, probabilities, and keys and values of all stages but one, in 16 bits, or in
    codes, which are widened there."""
    rows, columns = _rows(shape, tiles), block_d(shape)
    value_bytes = 1 if shape.is_scaled else 2
    loaded = 2 * (tiles.stages - 1) * tiles.block_n * columns * value_bytes
    return 2 * rows * (columns + tiles.block_n) + loaded


def prefill_tiles(shape: AttentionShape, arch: Arch) -> AttentionTiles:
    """Tiles of 64 rows: one warp group each, so that a neighbour's products fill the time of a softmax.

    Three stages where shared memory holds the queries and three tiles of keys and values; of codes two, as they are
    widened into shared memory besides.
    """
    rows, block_n = _PROMPT_ROWS, 64 if shape.head_dim <= 128 else 32
    row_bytes = 2 * block_d(shape)
    fits = (rows + 3 * 2 * block_n) * row_bytes <= arch.max_shared_bytes
    stages = 3 if fits and not shape.is_scaled else 2
    extra = further_programs(shape)
    return AttentionTiles(tile_queries(shape), block_n, extra, stages=stages, min_part=256)


def apart_tiles(shape: AttentionShape, arch: Arch) -> AttentionTiles:
    """Tiles for sequences with several queries alone, over codes.

    As no lone query fills a tile, it has 128 rows where shared memory holds them and three tiles of keys and values.
    """
    rows, block_n = 128, 64
    if (rows + 3 * 2 * block_n) * 2 * block_d(shape) <= arch.max_shared_bytes:
        tiles = AttentionTiles(max(1, rows // shape.group), block_n, num_warps=8, stages=3)
    else:
        tiles = prefill_tiles(shape, arch)
    return replace(tiles, extra=0, takes="several", reads_new=True)


def tile_queries(shape: AttentionShape) -> int:
    """Query tokens of a tile of a prompt."""
    return max(1, _PROMPT_ROWS // shape.group)


@cache  # layers have equal shapes
def variant(shape: AttentionShape, arch: Arch, tiles: AttentionTiles) -> KernelVariant:
    """The compiled specialization; without further parts the scratch pointers are gone."""
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
        "EXTRA": tiles.extra,
        "MIN_PART": tiles.min_part,
        "COMBINED": _combined(shape, tiles),
        "COLUMNS": _combined_columns(shape, tiles),
        "CODES": _codes(shape, arch),
        "STAGES": tiles.stages,
        "TAKES": tiles.takes,
        "IS_EARLY": tiles.is_early,
        "PDL": arch.has_pdl,
    }
    arguments = [
        pointer("q", shape.dtype),
        *_cache_arguments(shape),
        *(pointer(name, shape.dtype) for name in NEW if tiles.reads_new),
        pointer("block_tables", "i32"),
        pointer("seq_lens", "i32"),
        *((pointer("query_start", "i32"),) if tiles.reads_query_start else ()),
        *((pointer("part_start", "i32"),) if tiles.reads_part_start else ()),
        pointer("out", shape.dtype),
    ]
    if not tiles.reads_query_start:
        constants |= {"query_start": None}
    if not tiles.reads_part_start:
        constants |= {"part_start": None}
    if not tiles.reads_new:
        constants |= dict.fromkeys(NEW)
    if not shape.is_scaled:
        constants |= {"k_scale": None, "v_scale": None}
    scratch = (("partial", "fp32"), ("partial_max", "fp32"), ("partial_sum", "fp32"),
               ("counters", "i32"))  # fmt: skip
    if tiles.extra:
        arguments += [pointer(name, dtype) for name, dtype in scratch]
    else:
        constants |= {name: None for name, _ in scratch}
    arguments += [integer_argument("num_sequences"), integer_argument("table_stride")]
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
    """Programs: query tiles and further parts, kv heads; kv heads first where each query tile is one query."""
    count = num_tiles(tiles, sizes) + tiles.extra
    return (shape.num_kv_heads, count, 1) if tiles.is_decode else (count, shape.num_kv_heads, 1)


def scratch(shape: AttentionShape, tiles: AttentionTiles) -> tuple[Scratch, ...]:
    """Memory for parts' results: sums, maxima, weights and counters, in the kernel's order.

    A tile with further parts has a first one besides: twice as many hold all.
    """
    if not tiles.extra:
        return ()
    tiles_bytes = 4 * shape.num_kv_heads * tiles.extra
    rows_bytes = 2 * tiles_bytes * _part_rows(shape, tiles)
    return (
        Scratch("attention_partial", lambda _: rows_bytes * block_d(shape)),
        Scratch("attention_max", lambda _: rows_bytes),
        Scratch("attention_sum", lambda _: rows_bytes),
        Scratch("attention_counters", lambda _: tiles_bytes),
    )


def _combined(shape: AttentionShape, tiles: AttentionTiles) -> int:
    """Parts whose results fit into registers at a time; where few sequences are waited for, many are free."""
    values = (128 if tiles.is_early else 32) * 32 * tiles.num_warps
    return min(32, max(1, values // (_part_rows(shape, tiles) * _combined_columns(shape, tiles))))


def _combined_columns(shape: AttentionShape, tiles: AttentionTiles) -> int:
    columns = block_d(shape)
    return columns if _part_rows(shape, tiles) <= 16 else min(32, columns)


def _part_rows(shape: AttentionShape, tiles: AttentionTiles) -> int:
    return power_of_two(tiles.block_q * shape.group)


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
    return max(32 if shape.is_scaled else 16, power_of_two(shape.head_dim))


def _rows(shape: AttentionShape, tiles: AttentionTiles) -> int:
    rows = tiles.block_q * shape.group
    return max(_MIN_DOT_ROWS, power_of_two(rows))
