"""`rms_norm` on a CPU: torch's own, which accumulates in fp32."""

from collections.abc import Mapping

import torch

from kernels.batch import StepBatch
from kernels.cpu_form import BoundOp, CpuTarget, PackedWeight
from kernels.op import integer, number
from shared.ir import Node


def bind(node: Node, weights: Mapping[str, PackedWeight], target: CpuTarget) -> BoundOp:
    """One form for rows, one for rows with a residual, one for heads."""
    eps, head_dim = number(node, "eps"), integer(node, "head_dim")
    weight = weights["weight"].dense().to(target.activation_dtype)
    shape = list(weight.shape)
    norm, add = torch.ops.aten.rms_norm.default, torch.ops.aten.add.Tensor
    if node.attrs["residual"]:

        def run_residual(
            x: torch.Tensor, residual: torch.Tensor, batch: StepBatch
        ) -> tuple[torch.Tensor, torch.Tensor]:
            total = add(x, residual)
            return norm(total, shape, weight, eps), total

        return run_residual
    if head_dim:
        return lambda x, batch: norm(x.reshape(len(x), -1, head_dim), shape, weight, eps).flatten(1)
    return lambda x, batch: norm(x, shape, weight, eps)
