"""`embedding`: a row of the table for each token.

    x[t] = weight[token_ids[t]]

Weight: [V, M]. Attribute: dtype, of the result.
"""

from collections.abc import Mapping, Sequence

import torch

from kernels.batch import StepBatch
from kernels.op import Op, require_inputs
from shared.ir import Node, TensorSpec, WeightSpec


def infer(
    node: Node, inputs: tuple[TensorSpec, ...], weights: Mapping[str, WeightSpec]
) -> tuple[TensorSpec, ...]:
    """token_ids [T] -> x [T, M]."""
    require_inputs(inputs, 1)
    assert len(weights["weight"].shape) == 2, "the table is not [V, M]"
    dtype = node.attrs.get("dtype")
    assert isinstance(dtype, str), "embedding needs a dtype"
    return (TensorSpec((*inputs[0].dims, weights["weight"].shape[1]), dtype),)


def reference(
    node: Node,
    inputs: Sequence[torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    batch: StepBatch,
) -> tuple[torch.Tensor, ...]:
    """The rows; a table in fp64 gives fp64 whatever the attribute says."""
    rows_TM = weights["weight"][inputs[0].long()]
    if rows_TM.dtype == torch.float64:
        return (rows_TM,)
    return (rows_TM.to(getattr(torch, str(node.attrs["dtype"]))),)


EMBEDDING = Op("embedding", infer, reference)
