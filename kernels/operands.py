"""What several ops' launches have alike: what they read and write, their grids, and how attributes are read."""

from kernels.kv_cache import KvFormat
from kernels.launch import Batch, Grid, KvCache, Operand, Sizes, Temporary

TRITON_DTYPES = {
    "bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float8_e4m3fn": "fp8e4nv",
    "int32": "i32", "int8": "i8", "uint8": "u8",
}  # fmt: skip


def in_eight_bits(value: str, dtype: str, width: int) -> tuple[Temporary, Temporary]:
    """A value's rows in 8 bits and their scales. dtype is torch's name."""
    return Temporary(f"{value}.{dtype}", dtype, width), Temporary(f"{value}.scale", "float32", 1)


def rope_operands(layer: int, kept: KvFormat) -> list[Operand]:
    """What rotates queries and keys, and where keys and values go."""
    return [
        Batch("positions_T"),
        Batch("rope"),
        Batch("slot_mapping_T"),
        *cache_operands(layer, kept),
    ]


def cache_operands(layer: int, kept: KvFormat) -> list[Operand]:
    """A layer's keys and values, and their scales where they are kept in 8 bits."""
    return [KvCache(layer, part) for part in range(4 if kept.is_scaled else 2)]


def per_token(sizes: Sizes) -> Grid:
    """A program for each token of a step."""
    return sizes.tokens, 1, 1


def per_row(sizes: Sizes) -> Grid:
    """A program for each row whose logits are wanted."""
    return sizes.rows, 1, 1


def integer(value: object) -> int:
    """An attribute that is one."""
    assert isinstance(value, int), f"{value!r} is no integer"
    return value


def number(value: object) -> float:
    """An attribute that is one."""
    assert isinstance(value, int | float), f"{value!r} is no number"
    return float(value)
