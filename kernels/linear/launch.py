"""Which variants of the linear kernels serve a shape, and how they are launched.

Pure data: read by the compiler, which compiles the variants, and by the runtime, which launches them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

from kernels.launch import Grid, Scratch, Sizes
from kernels.linear.gpu import INT4_PARTS
from kernels.variant import Argument, KernelVariant, integer, pointer
from shared.arch import Arch

MAX_BLOCK_M = 64

# Steps of more tokens are faster through torch's products, by layout; measured on one H200. It has none of int8 with
# int8: there more tokens take larger tiles of ours.
MOST_FEW_TOKENS = {"plain": 64, "fp8_channel": 64, "int8_channel": 64, "int4_group": 64}
# Those that torch's library multiplies for many tokens.
LIBRARY_LAYOUTS = ("plain", "fp8_channel")

# Values of a stored word, whose columns lie far apart (gpu.py); other layouts store value by value.
_WORD_VALUES = {"int4_group": INT4_PARTS}


@dataclass(frozen=True, slots=True)
class LinearShape:
    """Everything that a linear launch is specialized for, except tiles.

    Args:
        n, k: rows and columns of the weight.
        dtype, out_dtype: Triton's names: `bf16`, `fp16`, `fp32`.
        layout: the weight's; one of `LAYOUTS`.
        group_size: values that share a scale; 0 where a row does.
        activations: "i8" or "fp8e4nv", as the weight: x comes in 8 bits with a scale per token.
        num_squares: x is an RMS norm's input times its gain, and its squares come in so many parts; 0 = no norm.
        has_rows: x's rows are gathered.
        has_gain: the result is a norm's input: it is also stored times the gain, with its squares.
        epilogue: "plain", "silu_mul" or "rope"; the latter uses what follows, of the KV cache.
    """

    n: int
    k: int
    dtype: str
    out_dtype: str
    layout: str = "plain"
    group_size: int = 0
    activations: str = ""
    has_bias: bool = False
    num_squares: int = 0
    eps: float = 0.0
    has_rows: bool = False
    has_residual: bool = False
    has_gain: bool = False
    epilogue: str = "plain"
    num_heads: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    kv_dtype: str = "bf16"
    block_tokens: int = 0

    @property
    def num_outputs(self) -> int:
        """Programs' rows: a pair of weight rows makes one where the epilogue pairs them."""
        return self.n if self.epilogue == "plain" else self.n // 2


@dataclass(frozen=True, slots=True)
class Tiles:
    """How the work is cut.

    Args:
        prefetch: weight chunks loaded before the wait.
        stages: pipeline depth.
        split_k: programs that share a tile's K.
        vector: most elements that a thread loads at once; 0 leaves it to the compiler.
    """

    block_n: int
    block_k: int
    num_warps: int
    prefetch: int = 1
    stages: int = 1
    split_k: int = 1
    vector: int = 0


# Layers have equal shapes: what one asked for is there for the next.
@cache
def one_token(shape: LinearShape, arch: Arch, tiles: Tiles) -> KernelVariant:
    """The variant for exactly one token."""
    if shape.layout == "int4_group":
        constants = {
            **_constants(shape, arch),
            "GROUP": shape.group_size,
            "BLOCK_N": tiles.block_n,
        }
        if uses_mma(shape):
            chunks = -(-shape.k // (INT4_PARTS * shape.group_size))
            assert chunks % tiles.num_warps == 0, f"{chunks} chunks of K, {tiles}"
            constants |= {"PREFETCH": tiles.prefetch}
            return _variant("linear_one_int4_mma", shape, arch, constants, tiles, ())
        constants |= {"BLOCK_K": tiles.block_k}
        return _variant("linear_one_int4", shape, arch, constants, tiles, ())
    constants = {
        **_constants(shape, arch),
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "PREFETCH": tiles.prefetch,
        "VECTOR": tiles.vector,
    }
    return _variant("linear_one", shape, arch, constants, tiles, ())


def uses_mma(shape: LinearShape) -> bool:
    """Claims that tensor cores multiply one token. Not where RoPE rides: its values were compared on no GPU."""
    is_int4 = shape.layout == "int4_group" and shape.dtype == "bf16"
    return is_int4 and shape.epilogue != "rope"


@cache
def few_tokens(shape: LinearShape, arch: Arch, tiles: Tiles, block_m: int) -> KernelVariant:
    """The variant for tiles of `block_m` tokens; its last argument is the number of tokens."""
    share = -(-shape.k // (tiles.split_k * tiles.block_k)) * tiles.block_k
    assert (tiles.split_k - 1) * share < shape.k, f"a split of K = {shape.k} is empty: {tiles}"
    constants = {
        **_constants(shape, arch),
        "VALUES": _WORD_VALUES.get(shape.layout, 1),
        "BLOCK_M": block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "SPLIT_K": tiles.split_k,
        "PREFETCH": tiles.prefetch,
        "STAGES": tiles.stages,
    }
    if tiles.split_k == 1:
        constants |= {"partial": None, "counters": None}
    if not shape.activations:
        constants |= {"x_scale": None}
    more = (
        pointer("partial", "fp32"),
        pointer("counters", "i32"),
        pointer("x_scale", "fp32"),
        integer("num_tokens"),
    )
    return _variant("linear_few", shape, arch, constants, tiles, more)


def quantized_rows(
    k: int, dtype: str, out_dtype: str, arch: Arch, *, is_static: bool = False
) -> KernelVariant:
    """The variant that gives rows of K values and their scales in 8 bits; dtypes are Triton's names.

    `is_static`: all rows have one scale, the last argument.
    """
    most = {"i8": 127.0, "fp8e4nv": 448.0}[out_dtype]
    return KernelVariant(
        op="linear",
        kernel="quantize_rows",
        arguments=(
            pointer("x", dtype),
            pointer("out", out_dtype),
            pointer("scale_out", "fp32"),
            *((Argument("scale", "fp32", False),) if is_static else ()),
        ),
        constants=(
            ("K", k),
            ("MOST", most),
            ("BLOCK", _power_of_two(k)),
            ("PDL", arch.has_pdl),
            *(() if is_static else (("scale", None),)),
        ),
        num_warps=8,
        has_pdl=arch.has_pdl,
    )


def int4_format(shape: LinearShape) -> str:
    """What kernels widen to."""
    return "int4" if shape.dtype == "bf16" else "int4_any"


def tiled_grid(
    shape: LinearShape, tiles: Tiles, block_m: int, field: str
) -> Callable[[Sizes], Grid]:
    """Blocks of the weight's rows, of as many tokens as `field` of a step says, and splits of K."""
    programs = num_programs(shape, tiles)
    return lambda sizes: (programs, -(-int(getattr(sizes, field)) // block_m), tiles.split_k)


def tiled_scratch(
    shape: LinearShape, tiles: Tiles, block_m: int, most_tokens: int | None = None
) -> tuple[Scratch, ...]:
    """Memory for the splits' parts and their counters, in the kernel's order, for steps of up to `most_tokens`."""
    if tiles.split_k == 1:
        return ()
    programs = num_programs(shape, tiles)
    part = tiles.block_n * block_m * 4 * (1 if shape.epilogue == "plain" else 2)

    def num_tiles(sizes: Sizes) -> int:
        tokens = sizes.tokens if most_tokens is None else min(sizes.tokens, most_tokens)
        return -(-tokens // block_m) * programs

    return (
        Scratch("linear_partial", lambda s: num_tiles(s) * tiles.split_k * part),
        Scratch("linear_counters", lambda s: num_tiles(s) * 4),
    )


def built_in_tiles(shape: LinearShape, arch: Arch, max_tokens: int) -> tuple[Tiles, int]:
    """How the work is cut where no table says otherwise, and the tokens of a tile; 1 is the kernel for one token.

    Args:
        max_tokens: of a step, as `Regime` has it.
    """
    if max_tokens == 1:
        block_m = one_token_block_m(shape)
        if block_m == 1:
            return one_token_tiles(shape), 1
        return few_tokens_tiles(shape, arch, block_m), block_m
    if max_tokens == 0 and (shape.activations or shape.layout == "int4_group"):
        return many_tokens_tiles(shape, arch)
    block_m = few_tokens_block_m(shape, arch, max_tokens or MAX_BLOCK_M)
    return few_tokens_tiles(shape, arch, block_m), block_m


def one_token_tiles(shape: LinearShape) -> Tiles:
    """The shipped choice; measured on one H100 in whole steps (docs/BENCHMARKS.md)."""
    if shape.layout == "int4_group":
        return _one_int4_tiles(shape)
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
    return replace(wanted, block_k=_block_k(shape.k, wanted.block_k))


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
    # Programs enough for a device of about 132 SMs, each with several chunks of K.
    split_k, programs = 1, num_programs(shape, wanted)
    is_split = not shape.activations or shape.k > 8192  # products of 8 bits are soon done
    while (
        is_split and split_k < 4 and split_k * programs < 128 and shape.k >= 8 * split_k * block_k
    ):
        split_k *= 2
    return replace(
        wanted, block_k=block_k, stages=max(2, min(wanted.stages, stages())), split_k=split_k
    )


def one_token_block_m(shape: LinearShape) -> int:
    """1 where the kernel for one token serves one token best; else tokens of a tile of `few_tokens`."""
    is_slow = shape.layout == "int4_group" and not uses_mma(shape) and shape.k > 8192
    return 16 if is_slow else 1


def _one_int4_tiles(shape: LinearShape) -> Tiles:
    """Measured on one H100 in a whole step."""
    if not uses_mma(shape):  # up to 4,096 values of a row at once, a quad of 32 a thread
        block_k = max(min(_power_of_two(shape.k), 4096), INT4_PARTS * shape.group_size)
        return Tiles(4, block_k, num_warps=max(1, block_k // 1024))
    block_k = INT4_PARTS * shape.group_size
    chunks, is_paired = -(-shape.k // block_k), shape.epilogue != "plain"
    num_warps = 4 if is_paired else 8
    while chunks % num_warps:
        num_warps //= 2
    prefetch = min(1 if is_paired else 2, chunks // num_warps)
    return Tiles(16, block_k, num_warps, prefetch)


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
    return min(wanted, divisor) if divisor >= 128 else min(wanted, _power_of_two(k))


def num_programs(shape: LinearShape, tiles: Tiles) -> int:
    """Programs along the weight's rows."""
    return -(-shape.num_outputs // tiles.block_n)


# Triton's dtype of the stored weight, by layout; a plain one has x's.
LAYOUTS = {"plain": None, "fp8_channel": "u8", "int8_channel": "i8", "int4_group": "i16"}


def _constants(shape: LinearShape, arch: Arch) -> dict[str, object]:
    formats = {
        "plain": "plain",
        "int8_channel": "int8_int8" if shape.activations else "int8",
        "fp8_channel": "fp8_fp8" if shape.activations else "fp8" if arch.has_fp8 else "fp8_bits",
        "int4_group": int4_format(shape),
    }
    absent = {
        "scale": shape.layout == "plain",
        "bias": not shape.has_bias,
        "squares": not shape.num_squares,
        "gain": not shape.has_gain,
        "normed": not shape.has_gain,
        "squares_out": not shape.has_gain,
        "rows": not shape.has_rows,
        "residual": not shape.has_residual,
        **dict.fromkeys(_ROPE, shape.epilogue != "rope"),
    }
    return {
        **{name: None for name, is_absent in absent.items() if is_absent},
        "N": shape.n,
        "K": shape.k,
        "EPS": shape.eps,
        "NUM_SQUARES": shape.num_squares,
        "EPILOGUE": shape.epilogue,
        "NUM_HEADS": shape.num_heads,
        "NUM_KV_HEADS": shape.num_kv_heads,
        "HEAD_DIM": shape.head_dim,
        "BLOCK_TOKENS": shape.block_tokens,
        "FORMAT": formats[shape.layout],
        "PDL": arch.has_pdl,
    }


_ROPE = ("positions", "rope", "slots", "k_cache", "v_cache")


def _variant(
    kernel: str,
    shape: LinearShape,
    arch: Arch,
    constants: dict[str, object],
    tiles: Tiles,
    more: tuple[Argument, ...],
) -> KernelVariant:
    every = (
        pointer("x", shape.activations or shape.dtype),
        pointer("weight", shape.activations or LAYOUTS[shape.layout] or shape.dtype),
        pointer("scale", "i32" if shape.group_size else "fp32"),
        pointer("bias", shape.dtype),
        pointer("squares", "fp32"),
        pointer("rows", "i32"),
        pointer("residual", shape.dtype),
        pointer("gain", shape.dtype),
        pointer("out", shape.out_dtype),
        pointer("normed", shape.dtype),
        pointer("squares_out", "fp32"),
        pointer("positions", "i32"),
        pointer("rope", "fp32"),
        pointer("slots", "i32"),
        pointer("k_cache", shape.kv_dtype),
        pointer("v_cache", shape.kv_dtype),
        *more,
    )
    return KernelVariant(
        op="linear",
        kernel=kernel,
        arguments=tuple(a for a in every if a.name not in constants),
        constants=tuple(constants.items()),  # type: ignore[arg-type]
        num_warps=tiles.num_warps,
        num_stages=tiles.stages,
        has_pdl=arch.has_pdl,
    )


def _power_of_two(number: int) -> int:
    """The least power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()
