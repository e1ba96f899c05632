"""`silu_mul`: the gated MLP's middle.

    gate, up = gate_up;  y = gate * sigmoid(gate) * up

Source: Shazeer 2020, "GLU Variants Improve Transformer", equation 6 (SwiGLU).
"""

from collections.abc import Mapping, Sequence

import torch

from kernels.batch import StepBatch
from kernels.op import Op, require_inputs, widened
from shared.ir import Node, TensorSpec, WeightSpec


def infer(
    node: Node, inputs: tuple[TensorSpec, ...], weights: Mapping[str, WeightSpec]
) -> tuple[TensorSpec, ...]:
    """gate_up [T, 2F] -> [T, F]."""
    require_inputs(inputs, 1)
    size = inputs[0].dims[-1]
    assert isinstance(size, int), "the row's length is unknown"
    assert size % 2 == 0, f"gate and up do not halve {size}"
    return (TensorSpec((*inputs[0].dims[:-1], size // 2), inputs[0].dtype),)


def reference(
    node: Node,
    inputs: Sequence[torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    batch: StepBatch,
) -> tuple[torch.Tensor, ...]:
    """The formula."""
    gate, up = widened(inputs[0]).chunk(2, -1)
    return ((torch.nn.functional.silu(gate) * up).to(inputs[0].dtype),)


SILU_MUL = Op("silu_mul", infer, reference, is_row_wise=True)
