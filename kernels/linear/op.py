"""`linear`: a matrix product, and a bias where there is one.

    y[n] = sum_k x[k] * weight[n, k] + bias[n]

Weights: weight [N, K], bias [N] (optional). How a weight is stored: kernels/linear/layouts.py.
Attribute: activations (optional): x is rounded first; "int8": to 255 levels, a scale per token; "fp8": to e4m3, by the
attribute input_scale, s:

    s[t] = max_k |x[t, k]| / 127;   x'[t, k] = round(x[t, k] / s[t]) * s[t]
    x'[t, k] = e4m3(clamp(x[t, k] / s, -448, 448)) * s

Legend: T rows of x, N out, K in.
"""

from collections.abc import Mapping, Sequence

import torch

from kernels.batch import StepBatch
from kernels.op import Op, number, require_inputs, require_last, widened
from shared.ir import Node, TensorSpec, WeightSpec

# The largest e4m3.
FP8_MAX = 448.0


def infer(
    node: Node, inputs: tuple[TensorSpec, ...], weights: Mapping[str, WeightSpec]
) -> tuple[TensorSpec, ...]:
    """x [., K] -> [., N]."""
    require_inputs(inputs, 1)
    assert len(weights["weight"].shape) == 2, "the weight is not [N, K]"
    assert activations(node) in ("", "int8", "fp8"), f"no activations of {activations(node)!r}"
    num_rows, num_columns = weights["weight"].shape
    require_last(inputs[0], num_columns, "x")
    if "bias" in weights:
        assert weights["bias"].shape == (num_rows,), f"bias is not [{num_rows}]"
    return (TensorSpec((*inputs[0].dims[:-1], num_rows), inputs[0].dtype),)


def activations(node: Node) -> str:
    """How a linear's input is rounded; empty where it is not."""
    return str(node.attrs.get("activations", ""))


def int8_tokens(x_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [T, K] and scales [T, 1], of x's dtype, fp32 or fp64."""
    scale_T1 = torch.linalg.vector_norm(x_TK, torch.inf, -1, keepdim=True)
    # A token of zeros stays one: nothing is divided by zero.
    scale_T1 = scale_T1.mul_(1 / 127).clamp_(min=1e-30)
    return (x_TK / scale_T1).round_().to(torch.int8), scale_T1


def multiplied(node: Node, x_TK: torch.Tensor) -> torch.Tensor:
    """The input, fp32 or fp64, as the product sees it."""
    if not activations(node):
        return x_TK
    if activations(node) == "fp8":
        scale = number(node, "input_scale")
        codes_TK = (x_TK / scale).clamp_(-FP8_MAX, FP8_MAX).float().to(torch.float8_e4m3fn)
        return codes_TK.to(x_TK.dtype) * scale
    codes_TK, scale_T1 = int8_tokens(x_TK)
    return codes_TK.to(x_TK.dtype) * scale_T1


def reference(
    node: Node,
    inputs: Sequence[torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    batch: StepBatch,
) -> tuple[torch.Tensor, ...]:
    """The formula, in fp32 or fp64."""
    x = multiplied(node, widened(inputs[0]))
    y = x @ weights["weight"].to(x.dtype).T
    if "bias" in weights:
        y = y + weights["bias"].to(x.dtype)
    return (y.to(inputs[0].dtype),)


LINEAR = Op("linear", infer, reference, is_row_wise=True)
