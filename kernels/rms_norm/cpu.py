"""`rms_norm` on a CPU: torch's own, which accumulates in fp32.

One token in fp32, the step that waits for every call, takes a dot product and a fused multiply
instead: torch's own is seven calls inside.
"""

import math
from collections.abc import Callable, Mapping

import torch

from kernels.batch import StepBatch
from kernels.cpu_form import BoundOp, CpuTarget, PackedWeight
from kernels.op import integer, number
from shared.ir import Node


def bind(node: Node, weights: Mapping[str, PackedWeight], target: CpuTarget) -> BoundOp:
    """One form for rows, one for rows with a residual, one for heads."""
    eps, head_dim = number(node, "eps"), integer(node, "head_dim")
    weight = weights["weight"].dense().to(target.activation_dtype)
    norm, add = _bind_norm(weight, eps), torch.ops.aten.add.Tensor
    if node.attrs["residual"]:

        def run_residual(
            x: torch.Tensor, residual: torch.Tensor, batch: StepBatch
        ) -> tuple[torch.Tensor, torch.Tensor]:
            total = add(x, residual)
            return norm(total), total

        return run_residual
    if head_dim:
        torch_norm = torch.ops.aten.rms_norm.default
        return lambda x, batch: torch_norm(
            x.reshape(len(x), -1, head_dim), [head_dim], weight, eps
        ).flatten(1)
    return lambda x, batch: norm(x)


def _bind_norm(weight_M: torch.Tensor, eps: float) -> Callable[[torch.Tensor], torch.Tensor]:
    size = len(weight_M)
    zeros_1M = torch.zeros(1, size)
    dot, addcmul = torch.ops.aten.dot.default, torch.ops.aten.addcmul.default
    norm, is_fp32 = torch.ops.aten.rms_norm.default, weight_M.dtype == torch.float32

    def run(x_TM: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor
        if x_TM.shape[0] == 1 and is_fp32:
            x_M = x_TM[0]
            scale = 1 / math.sqrt(dot(x_M, x_M).item() / size + eps)
            result = addcmul(zeros_1M, x_TM, weight_M, value=scale)
        else:
            result = norm(x_TM, [size], weight_M, eps)
        return result

    return run
