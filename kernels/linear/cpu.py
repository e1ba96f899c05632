"""`linear` on a CPU: the packing that this CPU multiplies fastest, made when an engine is loaded.

| activations | stored as | few rows | many rows |
|---|---|---|---|
| fp32 | int8_channel | our kernel | fp16, FBGEMM |
| fp32 | int4_group | torch's int4 | fp16, FBGEMM |
| fp32 | any other, of bf16 values | fp16, FBGEMM | fp16, FBGEMM |
| fp32 | plain fp32 | fp32, oneDNN | fp32, oneDNN |
| bf16 | int8_channel | bytes where there is VNNI, else our kernel | bytes where there is VNNI, else bf16, oneDNN |
| bf16 | plain | our kernel | bf16, oneDNN |
| bf16 | int4_group | our kernel of nibbles where there is VNNI, else torch's int4 | bf16, oneDNN |
| bf16 | int8_group | torch's int4, twice | bf16, oneDNN |
| bf16 | fp8_channel | bf16, oneDNN | bf16, oneDNN |
| any, rounded to int8 | int8_channel | bytes where there is VNNI, else int8, oneDNN | the same |

All accumulate in fp32, int8 with int8 exactly in int32. Few rows wait for the weight's bytes, many for arithmetic.
fp16 keeps 11 bits of a value, bf16 has 8; values beyond fp16's range keep the fp32 form.

Products of bytes (`cpu_kernel_bytes.py`) have two of them for a value of x, 15 bits below its row's largest magnitude,
or one where the scheme rounds activations to int8. They reach what the CPU can multiply, so two bytes take what bf16
takes for many rows, and for few rows wait for the weight's bytes alone (docs/BENCHMARKS.md has times). No weight is
kept in bf16 beside its codes, and a row's sums are the same in any step. int4 of few rows is like it, with a scale for
each group. Steps that call kernels of ours alone are replayed without Python (`kernels/cpu_program.py`).

Measured for all linears in a 135M model's layers, in ms. Zen 4, 2 cores with bf16 arithmetic, 1 / 4 / 16 rows:
our int8 3.7 / 8.6 / 34; torch's int8 9.2 / - / 33; torch's int4 3.8 / - / 22; oneDNN bf16 11.5 / - / 16.1. 2 cores
with AVX2 alone: fp16 15.0 / 18.0 / 33.8; int4 10.2 / 15.1 / 52.1.

bf16 products round what they read to bf16: values for many rows, scales and zeros of torch's int4. Weights that
schemes of ours quantized have scales that are bf16 numbers already; those that checkpoints bring have not
(docs/CHECKPOINTS.md says what that costs).

oneDNN compiles a product for every number of rows and keeps it, half a megabyte each: it is asked only for a few
numbers, which steps are padded up to (`padded_rows`). Over steps of random sizes that costs less time, too.

Legend: N out, K in, J groups along K, G values per group.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch.nn.functional import pad

from kernels.cpu_form import BoundOp, CpuTarget, PackedWeight
from kernels.cpu_jit import TAGS, address
from kernels.linear.cpu_kernel import BLOCK_N, VECTOR_BYTES, few_rows, few_rows_of_nibbles
from kernels.linear.cpu_kernel_bytes import PANEL_COLUMNS, PANEL_ROWS, rows_of_bytes
from kernels.linear.op import activations, int8_tokens
from shared.ir import Node

# What oneDNN packs for.
MANY_ROWS = 16
# Up to so many rows each form for few rows wins.
_MOST_ROWS = {"int8_channel": 5, "int8_group": 4, "int4_group": 8, "plain": 3}
_MOST_FP32_ROWS = 4
# The same of our kernel that multiplies nibbles.
_MOST_NIBBLE_ROWS = 8
# Beyond it a sum of products of bytes may not fit int32.
_MOST_BYTE_COLUMNS = 1 << 16
_TORCH_INT4_GROUPS = (32, 64, 128, 256)
_FP16_MAX = 65504.0

# Up to so many rows every number has a product of its own; beyond it, eight numbers an octave, multiples of four.
_MOST_UNPADDED_ROWS = 16
_LEAST_PADDING = 4

_CODE_TAG, _DOT_TAG = np.int8(0), np.int32(0)

Product = Callable[[torch.Tensor], torch.Tensor]


def bind(node: Node, weights: Mapping[str, PackedWeight], target: CpuTarget) -> BoundOp:
    """The product, and the bias where there is one."""
    weight = weights["weight"]
    bias = weights["bias"].dense() if "bias" in weights else None
    choose = _int8_product if activations(node) == "int8" else _product
    product = choose(weight, bias, target)
    return lambda x, batch: product(x)


def padded_rows(num_rows: int) -> int:
    """The rows that a product of `num_rows` is computed for by oneDNN: at most an eighth more, or 3."""
    if num_rows <= _MOST_UNPADDED_ROWS:
        return num_rows
    multiple = max(_LEAST_PADDING, 1 << ((num_rows - 1).bit_length() - 4))
    return -(-num_rows // multiple) * multiple


def _padded(multiply: Product) -> Product:
    """`multiply`, which sees padded numbers of rows alone."""

    def run(x: torch.Tensor) -> torch.Tensor:
        num_rows = x.shape[0]
        num_padded = padded_rows(num_rows)
        if num_padded == num_rows:
            return multiply(x)
        filled = x.new_zeros(num_padded, x.shape[1])
        filled[:num_rows] = x
        return multiply(filled)[:num_rows]

    return run


def _takes_fp16(weight: PackedWeight, target: CpuTarget) -> bool:
    return target.has_fbgemm and weight.spec.dtype == "bfloat16"


def _takes_bytes(weight: PackedWeight, target: CpuTarget) -> bool:
    """Claims that codes of x can be multiplied with the weight's as they are."""
    num_columns = weight.spec.shape[1]
    fits = num_columns % PANEL_COLUMNS == 0 and num_columns <= _MOST_BYTE_COLUMNS
    return target.has_vnni and weight.spec.layout == "int8_channel" and fits


def _takes_nibbles(weight: PackedWeight, target: CpuTarget) -> bool:
    """Claims that the weight is multiplied as it is, with activations of two bytes."""
    num_rows, num_columns = weight.spec.shape
    if not (target.has_vnni and target.activation_dtype == torch.bfloat16):
        return False
    if weight.spec.layout != "int4_group" or num_rows % BLOCK_N or num_columns % VECTOR_BYTES:
        return False
    return num_columns // weight.tensors["scale"].shape[1] % VECTOR_BYTES == 0


def _most_rows(weight: PackedWeight, target: CpuTarget) -> int:
    if _takes_nibbles(weight, target):
        return _MOST_NIBBLE_ROWS
    most = _MOST_ROWS[weight.spec.layout]
    return most if target.activation_dtype == torch.bfloat16 else min(most, _MOST_FP32_ROWS)


def _product(weight: PackedWeight, bias: torch.Tensor | None, target: CpuTarget) -> Product:
    if _takes_bytes(weight, target) and target.activation_dtype == torch.bfloat16:
        return _byte_product(weight, bias, target.activation_dtype, num_bytes=2)
    many = _many_rows_product(
        weight, None if bias is None else bias.to(target.activation_dtype), target
    )
    few = _few_rows_product(weight, bias, target)
    if few is None:
        return many
    most_rows = _most_rows(weight, target)
    return lambda x: many(x) if x.shape[0] > most_rows else few(x)


def _int8_product(weight: PackedWeight, bias_N: torch.Tensor | None, target: CpuTarget) -> Product:
    """Codes times codes, exact in int32, then the scales of token and channel."""
    if _takes_bytes(weight, target):
        return _byte_product(weight, bias_N, target.activation_dtype, num_bytes=1)
    codes_KN, scale_N = weight.tensors["weight"].t(), weight.tensors["scale"]
    multiply = _padded(lambda codes_TK: torch.ops.aten._int_mm.default(codes_TK, codes_KN))

    def run(x_TK: torch.Tensor) -> torch.Tensor:
        codes_TK, scale_T1 = int8_tokens(x_TK.float())
        y_TN: torch.Tensor = multiply(codes_TK).float().mul_(scale_T1).mul_(scale_N)
        if bias_N is not None:
            y_TN.add_(bias_N)
        return y_TN.to(target.activation_dtype)

    return run


def _many_rows_product(
    weight: PackedWeight, bias_N: torch.Tensor | None, target: CpuTarget
) -> Product:
    dense_NK = weight.dense()
    if target.activation_dtype == torch.bfloat16:
        return _dense_product(dense_NK.bfloat16(), bias_N, target)
    low, high = dense_NK.aminmax()
    if not _takes_fp16(weight, target) or max(-low, high) > _FP16_MAX:
        return _dense_product(dense_NK, bias_N, target)
    packed = torch.ops.quantized.linear_prepack_fp16(dense_NK, bias_N)
    multiply = torch.ops.quantized.linear_dynamic_fp16.default
    return lambda x: multiply(x, packed)


def _few_rows_product(
    weight: PackedWeight, bias_N: torch.Tensor | None, target: CpuTarget
) -> Product | None:
    """The product straight from stored values; None where the other form is as good."""
    num_rows, num_columns = weight.spec.shape
    if _takes_nibbles(weight, target):
        return _nibble_product(weight, bias_N, target.activation_dtype)
    if weight.spec.layout in ("int4_group", "int8_group"):
        grouped = _grouped_product(weight, target)
        if grouped is None or bias_N is None:
            return grouped
        added_N = bias_N.to(target.activation_dtype)
        return lambda x: grouped(x).add_(added_N)
    stored = weight.tensors["weight"]
    is_ours = weight.spec.layout == "int8_channel" or (
        weight.spec.layout == "plain" and stored.dtype == target.activation_dtype == torch.bfloat16
    )
    if not is_ours or num_rows % BLOCK_N:
        return None
    codes_NK = stored.contiguous()
    scale_N = weight.tensors["scale"] if "scale" in weight.tensors else torch.ones(num_rows)
    dtype = target.activation_dtype
    tags = TAGS[dtype], TAGS[stored.dtype], TAGS[torch.float32]

    def run(x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(len(x), num_rows)
        few_rows(
            address(x, dtype), codes_NK.data_ptr(), scale_N.data_ptr(), address(bias_N, torch.float32),
            out.data_ptr(), len(x), num_rows, num_columns, *tags, stored.element_size(),
        )  # fmt: skip
        return out

    return run


def pack_bytes(codes_NK: torch.Tensor) -> torch.Tensor:
    """int8 codes as `rows_of_bytes` reads them: uint8 [ceil(N / 32), K / 4, 32, 4], each moved by 128."""
    num_rows, num_columns = codes_NK.shape
    moved_NK = pad(codes_NK, (0, 0, 0, -num_rows % PANEL_ROWS)).view(torch.uint8) ^ 128
    panels = moved_NK.view(-1, PANEL_ROWS, num_columns // PANEL_COLUMNS, PANEL_COLUMNS)
    return panels.transpose(1, 2).contiguous()


def _byte_product(
    weight: PackedWeight, bias_N: torch.Tensor | None, dtype: torch.dtype, num_bytes: int
) -> Product:
    """Of int8 weights and codes of `num_bytes` a value of x."""
    packed, scale_N = pack_bytes(weight.tensors["weight"]), weight.tensors["scale"]
    num_rows, num_columns = weight.spec.shape
    tags = TAGS[dtype], TAGS[torch.float32], _CODE_TAG, _DOT_TAG

    def run(x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(len(x), num_rows)
        rows_of_bytes(
            address(x, dtype), packed.data_ptr(), scale_N.data_ptr(), address(bias_N, torch.float32),
            out.data_ptr(), len(x), num_rows, num_columns, num_bytes, *tags,
        )  # fmt: skip
        return out

    return run


def pack_nibbles(stored_NK: torch.Tensor) -> torch.Tensor:
    """`int4_group`'s bytes [N, K / 2] as `few_rows_of_nibbles` reads them: uint8 [N / 4, K / 64, 2, 64]."""
    nibbles_NK = torch.stack((stored_NK & 15, stored_NK >> 4), -1).flatten(1)
    num_rows, num_columns = nibbles_NK.shape
    rows = nibbles_NK.view(num_rows // BLOCK_N, 2, 2, num_columns // VECTOR_BYTES, VECTOR_BYTES)
    return (rows[:, :, 0] | rows[:, :, 1] << 4).transpose(1, 2).contiguous()


def _nibble_product(
    weight: PackedWeight, bias_N: torch.Tensor | None, dtype: torch.dtype
) -> Product:
    packed = pack_nibbles(weight.tensors["weight"])
    num_rows, num_columns = weight.spec.shape
    sizes = num_rows, num_columns, num_columns // weight.tensors["scale"].shape[1]
    # Zeros are read in whole vectors, beyond the last ones too.
    scale, zero = (
        pad(weight.tensors[role].bfloat16().flatten(), (0, 16)) for role in ("scale", "zero")
    )
    tags = TAGS[dtype], TAGS[torch.bfloat16], TAGS[torch.float32]

    def run(x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(len(x), num_rows)
        few_rows_of_nibbles(
            address(x, dtype), packed.data_ptr(), scale.data_ptr(), zero.data_ptr(),
            address(bias_N, torch.float32), out.data_ptr(), len(x), *sizes, *tags,
        )  # fmt: skip
        return out

    return run


def _grouped_product(weight: PackedWeight, target: CpuTarget) -> Product | None:
    """By torch's int4 kernel, which works in bf16 on whole vectors and blocks of rows, and does not check."""
    num_rows, num_columns = weight.spec.shape
    if target.kv_dtype != torch.bfloat16 or num_columns % 32 or num_rows % 16:
        return None
    stored, scale_NJ = weight.tensors["weight"], weight.tensors["scale"]
    if weight.spec.layout == "int4_group":
        nibbles_NK = torch.stack((stored & 15, stored >> 4), -1).flatten(1)
        multiply = _int4_product(nibbles_NK, scale_NJ, weight.tensors["zero"])
    elif target.activation_dtype == torch.bfloat16:
        multiply = _int8_group_product(stored, scale_NJ)
    else:
        return None  # fp16 holds an int8 and reads no more bytes than two int4
    if multiply is None or target.activation_dtype == torch.bfloat16:
        return multiply
    return lambda x: multiply(x.bfloat16()).float()


def _int4_product(
    nibbles_NK: torch.Tensor, scale_NJ: torch.Tensor, zero_NJ: torch.Tensor
) -> Product | None:
    """x times (nibble - 8) * scale + zero, straight from the nibbles."""
    group = nibbles_NK.shape[1] // scale_NJ.shape[1]
    if group not in _TORCH_INT4_GROUPS:
        return None
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles_NK.int(), 1)
    # [J, N, 2]: scale and zero of each group, as torch's kernel reads them.
    scales = torch.stack((scale_NJ.T, zero_NJ.T), -1).bfloat16().contiguous()
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu.default
    return lambda x: multiply(x, packed, group, scales)


def _int8_group_product(codes_NK: torch.Tensor, scale_NJ: torch.Tensor) -> Product | None:
    """torch multiplies no int8 in groups, but an int8 is two nibbles:

    code = 16 * high + low = (16 * (h - 8) + 8) + (l - 8)  with h, l in 0 .. 15

    Each product is rounded to bf16 before they are added. The 8 goes with the high one: codes are about 0 on
    average, and so is each term then. With the low one, the terms would be large for inputs whose mean is not 0,
    and cancel.
    """
    codes = codes_NK.int()
    # Rounded once here: a multiple of it by a power of two is then the same number in bf16.
    scale = scale_NJ.bfloat16().float()
    high = _int4_product((codes >> 4) + 8, 16 * scale, 8 * scale)
    low = _int4_product(codes & 15, scale, torch.zeros_like(scale))
    if high is None or low is None:
        return None
    return lambda x: high(x).add_(low(x))


def _dense_product(dense_NK: torch.Tensor, bias: torch.Tensor | None, target: CpuTarget) -> Product:
    if target.has_mkldnn and dense_NK.dtype in (torch.float32, torch.bfloat16):
        packed = torch.ops.mkldnn._reorder_linear_weight(dense_NK, MANY_ROWS)
        multiply = torch.ops.mkldnn._linear_pointwise.default
        return _padded(lambda x: multiply(x, packed, bias, "none", [], ""))
    linear = torch.ops.aten.linear.default
    return lambda x: linear(x, dense_NK, bias)
