"""`linear` on a CPU: the packing that this CPU multiplies fastest, made when an engine is loaded.

| activations | stored as | packed as | product |
|---|---|---|---|
| fp32 | int4_group | int4 up to 4 rows, else as the next | bf16 operands, fp32 accumulated |
| fp32 | any, of bf16 values | fp16, FBGEMM | fp32 accumulated |
| fp32 | plain fp32 | fp32, oneDNN | |
| bf16 | int8_channel | int8 for few rows, bf16 oneDNN for many | fp32 accumulated |
| bf16 | int8_group | two int4 for few rows, bf16 oneDNN for many | fp32 accumulated |
| bf16 | int4_group | int4 for few rows, bf16 oneDNN for many | fp32 accumulated |
| bf16 | plain, fp8_channel | bf16, oneDNN | |
| any, rounded to int8 | int8_channel | int8, oneDNN (VNNI where there is) | int32 accumulated |

Measured without bf16 arithmetic (2 cores with AVX2, ms for all linears in a 135M model's layers,
1 / 4 / 16 rows): fp16 15.0 / 18.0 / 33.8; int4 10.2 / 15.1 / 52.1; int8 13.7 / 18.8 / 59.8, whose
gain at one row goes into casting activations to bf16 and back. Below `MANY_ROWS` a product waits
for the weight's bytes, above it for arithmetic. fp16 keeps 11 bits of a value, bf16 has 8; values
beyond fp16's range keep the fp32 form.

bf16 products round what they read to bf16: values for many rows, scales and zeros for few. Weights
that schemes of ours quantized have scales that are bf16 numbers already; those that checkpoints
bring have not (docs/CHECKPOINTS.md says what that costs).

Legend: N out, K in, J groups along K, G values per group.
"""

from collections.abc import Callable, Mapping

import torch

from kernels.cpu_form import BoundOp, CpuTarget, PackedWeight
from kernels.linear.op import activations, int8_tokens
from shared.ir import Node

MANY_ROWS = 16
_FEW_INT4_ROWS = 4
_TORCH_INT4_GROUPS = (32, 64, 128, 256)
_FP16_MAX = 65504.0

Product = Callable[[torch.Tensor], torch.Tensor]


def bind(node: Node, weights: Mapping[str, PackedWeight], target: CpuTarget) -> BoundOp:
    """The product, and the bias where there is one."""
    weight = weights["weight"]
    bias = weights["bias"].dense() if "bias" in weights else None
    if activations(node) == "int8":
        product = _int8_product(weight, bias, target)
    elif target.activation_dtype == torch.bfloat16:
        product = _bf16_product(weight, bias, target)
    else:
        product = _fp32_product(weight, bias, target)
    return lambda x, batch: product(x)


def describe(node: Node, weights: Mapping[str, PackedWeight], target: CpuTarget) -> str:
    """The table's row that `bind` chooses, for people."""
    layout = weights["weight"].spec.layout
    if activations(node) == "int8":
        return "int8 both"
    if target.activation_dtype == torch.bfloat16:
        few = {"int8_channel": "int8", "int8_group": "two int4", "int4_group": "int4"}.get(layout)
        return f"{few} below {MANY_ROWS} rows, else bf16" if few else "bf16"
    return "fp16 (FBGEMM)" if _takes_fp16(weights["weight"], target) else "fp32"


def _takes_fp16(weight: PackedWeight, target: CpuTarget) -> bool:
    return target.has_fbgemm and weight.spec.dtype == "bfloat16"


def _fp32_product(weight: PackedWeight, bias: torch.Tensor | None, target: CpuTarget) -> Product:
    dense_NK = weight.dense()
    low, high = dense_NK.aminmax()
    if _takes_fp16(weight, target) and max(-low, high) <= _FP16_MAX:
        packed = torch.ops.quantized.linear_prepack_fp16(dense_NK, bias)
        multiply = torch.ops.quantized.linear_dynamic_fp16.default

        def many(x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = multiply(x, packed)
            return y

        few = _few_rows_product(weight) if weight.spec.layout == "int4_group" else None
        return many if few is None else _int4_unless_many(few, many, bias)
    return _dense_product(dense_NK, bias, target)


def _int4_unless_many(few: Product, many: Product, bias_N: torch.Tensor | None) -> Product:
    def run(x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > _FEW_INT4_ROWS:
            return many(x)
        y = few(x.bfloat16()).float()
        return y if bias_N is None else y.add_(bias_N)

    return run


def _bf16_product(weight: PackedWeight, bias: torch.Tensor | None, target: CpuTarget) -> Product:
    many = _dense_product(
        weight.dense().bfloat16(), None if bias is None else bias.bfloat16(), target
    )
    few = _few_rows_product(weight)
    if few is None:
        return many
    bias_N = None if bias is None else bias.bfloat16()

    def run(x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] >= MANY_ROWS:
            return many(x)
        y = few(x)
        return y if bias_N is None else y.add_(bias_N)

    return run


def _int8_product(weight: PackedWeight, bias_N: torch.Tensor | None, target: CpuTarget) -> Product:
    """Codes times codes, exact in int32, then the scales of token and channel."""
    codes_KN, scale_N = weight.tensors["weight"].t(), weight.tensors["scale"]
    multiply = torch.ops.aten._int_mm.default

    def run(x_TK: torch.Tensor) -> torch.Tensor:
        codes_TK, scale_T1 = int8_tokens(x_TK.float())
        y_TN: torch.Tensor = multiply(codes_TK, codes_KN).float().mul_(scale_T1).mul_(scale_N)
        if bias_N is not None:
            y_TN.add_(bias_N)
        return y_TN.to(target.activation_dtype)

    return run


def _few_rows_product(weight: PackedWeight) -> Product | None:
    """The product straight from quantized values, where torch has one for these sizes."""
    tensors = weight.tensors
    num_rows, num_columns = weight.spec.shape
    # torch's kernels work on whole vectors and blocks of rows, and do not check.
    if num_columns % 32:
        return None
    if weight.spec.layout == "int8_channel" and num_rows % 4 == 0:
        codes_NK, scale_N = tensors["weight"], tensors["scale"].bfloat16()
        multiply = torch.ops.aten._weight_int8pack_mm.default
        return lambda x: multiply(x, codes_NK, scale_N)
    if weight.spec.layout == "int4_group" and num_rows % 16 == 0:
        stored = tensors["weight"]
        codes_NK = torch.stack((stored & 15, stored >> 4), -1).flatten(1)
        return _int4_product(codes_NK, tensors["scale"], tensors["zero"])
    if weight.spec.layout == "int8_group" and num_rows % 16 == 0:
        return _int8_group_product(tensors["weight"], tensors["scale"])
    return None


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

    code = 16 * high + low = 16 * (h - 8) + (l - 8) + 8  with h, l in 0 .. 15
    """
    codes = codes_NK.int()
    # Rounded once here: a multiple of it by a power of two is then the same number in bf16.
    scale = scale_NJ.bfloat16().float()
    high = _int4_product((codes >> 4) + 8, 16 * scale, torch.zeros_like(scale))
    low = _int4_product(codes & 15, scale, 8 * scale)
    if high is None or low is None:
        return None
    return lambda x: high(x).add_(low(x))


def _dense_product(dense_NK: torch.Tensor, bias: torch.Tensor | None, target: CpuTarget) -> Product:
    if target.has_mkldnn and dense_NK.dtype in (torch.float32, torch.bfloat16):
        packed = torch.ops.mkldnn._reorder_linear_weight(dense_NK, MANY_ROWS)
        multiply = torch.ops.mkldnn._linear_pointwise.default
        return lambda x: multiply(x, packed, bias, "none", [], "")
    linear = torch.ops.aten.linear.default
    return lambda x: linear(x, dense_NK, bias)
