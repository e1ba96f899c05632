"""`split`: a value's slices along its last dim. Attribute: sizes, which add up to that dim."""

from collections.abc import Mapping, Sequence

import torch

from kernels.batch import StepBatch
from kernels.op import Op, numbers, require_inputs, require_last
from shared.ir import Node, TensorSpec, WeightSpec


def infer(
    node: Node, inputs: tuple[TensorSpec, ...], weights: Mapping[str, WeightSpec]
) -> tuple[TensorSpec, ...]:
    """x [., N] -> slices of the given sizes."""
    require_inputs(inputs, 1)
    parts = sizes(node)
    require_last(inputs[0], sum(parts), "x")
    return tuple(TensorSpec((*inputs[0].dims[:-1], size), inputs[0].dtype) for size in parts)


def reference(
    node: Node,
    inputs: Sequence[torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    batch: StepBatch,
) -> tuple[torch.Tensor, ...]:
    """Views of `x`."""
    return torch.split_with_sizes(inputs[0], list(sizes(node)), -1)


def sizes(node: Node) -> tuple[int, ...]:
    """The slices' sizes, in order."""
    return tuple(int(size) for size in numbers(node, "sizes"))


SPLIT = Op("split", infer, reference, is_row_wise=True)
