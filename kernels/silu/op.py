"""`silu`: x * sigmoid(x), element-wise.

Source: Hendrycks and Gimpel 2016, "Gaussian Error Linear Units", section 2.
"""

from collections.abc import Mapping, Sequence

import torch

from kernels.batch import StepBatch
from kernels.op import Op, require_inputs, widened
from shared.ir import Node, TensorSpec, WeightSpec


def infer(
    node: Node, inputs: tuple[TensorSpec, ...], weights: Mapping[str, WeightSpec]
) -> tuple[TensorSpec, ...]:
    """x -> same."""
    require_inputs(inputs, 1)
    return (inputs[0],)


def reference(
    node: Node,
    inputs: Sequence[torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    batch: StepBatch,
) -> tuple[torch.Tensor, ...]:
    """The formula."""
    return ((torch.nn.functional.silu(widened(inputs[0]))).to(inputs[0].dtype),)


SILU = Op("silu", infer, reference)
