"""`mul`: the element-wise product."""

from collections.abc import Mapping, Sequence

import torch

from kernels.batch import StepBatch
from kernels.op import Op, require_inputs, widened
from shared.ir import Node, TensorSpec, WeightSpec


def infer(
    node: Node, inputs: tuple[TensorSpec, ...], weights: Mapping[str, WeightSpec]
) -> tuple[TensorSpec, ...]:
    """x, y of one shape -> same."""
    require_inputs(inputs, 2)
    assert inputs[0].dims == inputs[1].dims, f"{inputs[0].dims} and {inputs[1].dims} differ"
    return (inputs[0],)


def reference(
    node: Node,
    inputs: Sequence[torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    batch: StepBatch,
) -> tuple[torch.Tensor, ...]:
    """The formula."""
    return ((widened(inputs[0]) * widened(inputs[1])).to(inputs[0].dtype),)


MUL = Op("mul", infer, reference)
