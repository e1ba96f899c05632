"""`linear`: a matrix product, and a bias where there is one.

    y[n] = sum_k x[k] * weight[n, k] + bias[n]

Weights: weight [N, K], bias [N] (optional). How a weight is stored: kernels/linear/layouts.py.
"""

from collections.abc import Mapping, Sequence

import torch

from kernels.batch import StepBatch
from kernels.op import Op, require_inputs, require_last, widened
from shared.ir import Node, TensorSpec, WeightSpec


def infer(
    node: Node, inputs: tuple[TensorSpec, ...], weights: Mapping[str, WeightSpec]
) -> tuple[TensorSpec, ...]:
    """x [., K] -> [., N]."""
    require_inputs(inputs, 1)
    assert len(weights["weight"].shape) == 2, "the weight is not [N, K]"
    num_rows, num_columns = weights["weight"].shape
    require_last(inputs[0], num_columns, "x")
    if "bias" in weights:
        assert weights["bias"].shape == (num_rows,), f"bias is not [{num_rows}]"
    return (TensorSpec((*inputs[0].dims[:-1], num_rows), inputs[0].dtype),)


def reference(
    node: Node,
    inputs: Sequence[torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    batch: StepBatch,
) -> tuple[torch.Tensor, ...]:
    """The formula, in fp32 or fp64."""
    x = widened(inputs[0])
    y = x @ weights["weight"].to(x.dtype).T
    if "bias" in weights:
        y = y + weights["bias"].to(x.dtype)
    return (y.to(inputs[0].dtype),)


LINEAR = Op("linear", infer, reference)
