"""`select_rows`: the rows whose logits are wanted.

y[r] = x[logit_rows[r]]
"""

from collections.abc import Mapping, Sequence

import torch

from kernels.batch import StepBatch
from kernels.op import Op, require_inputs
from shared.ir import Node, TensorSpec, WeightSpec


def infer(
    node: Node, inputs: tuple[TensorSpec, ...], weights: Mapping[str, WeightSpec]
) -> tuple[TensorSpec, ...]:
    """x [T, M] -> [R, M]."""
    require_inputs(inputs, 1)
    assert inputs[0].dims[0] == "T", f"rows are {inputs[0].dims[0]}, not packed tokens"
    return (TensorSpec(("R", *inputs[0].dims[1:]), inputs[0].dtype),)


def reference(
    node: Node,
    inputs: Sequence[torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    batch: StepBatch,
) -> tuple[torch.Tensor, ...]:
    """The rows."""
    return (inputs[0][batch.logit_rows_R.long()],)


SELECT_ROWS = Op("select_rows", infer, reference)
