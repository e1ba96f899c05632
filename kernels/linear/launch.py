"""The variants of the linear kernels for a shape and tiles, and how they are launched; tiles.py chooses the tiles.

Pure data: read by the compiler, which compiles the variants, and by the runtime, which launches them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from kernels.launch import Grid, Scratch, Sizes, power_of_two
from kernels.linear.gpu import INT4_PARTS
from kernels.variant import Argument, KernelVariant, integer, pointer
from shared.arch import Arch

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
        dtype, out_dtype: Triton's names: `bf16`, `fp32`; `fp16` in tests alone: engines of fp16 checkpoints are bf16.
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
            assert tiles.stages <= chunks // tiles.num_warps, f"{chunks} chunks of K, {tiles}"
            constants |= {"STAGES": tiles.stages}
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
    """Claims that tensor cores multiply one token."""
    return shape.layout == "int4_group" and shape.dtype == "bf16"


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
            ("BLOCK", power_of_two(k)),
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


def num_programs(shape: LinearShape, tiles: Tiles) -> int:
    """Programs along the weight's rows."""
    return -(-shape.num_outputs // tiles.block_n)


# Triton's dtype of the stored weight, by layout; a plain one has x's.
LAYOUTS = {"plain": None, "fp8_channel": "u8", "int8_channel": "i8", "int4_group": "i16"}


def _constants(shape: LinearShape, arch: Arch) -> dict[str, object]:
    formats = {
        "plain": "plain",
        "int8_channel": "int8_int8" if shape.activations else "int8",
        "fp8_channel": "fp8_fp8" if shape.activations else "fp8",
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
