"""`silu_mul` on a CPU."""

from collections.abc import Mapping

import torch

from kernels.batch import StepBatch
from kernels.cpu_form import BoundOp, CpuTarget, PackedWeight
from shared.ir import Node


def bind(node: Node, weights: Mapping[str, PackedWeight], target: CpuTarget) -> BoundOp:
    """Two calls: silu of the first half, times the second."""
    silu, strided = torch.ops.aten.silu.default, torch.ops.aten.as_strided.default

    def run(gate_up_TN: torch.Tensor, batch: StepBatch) -> torch.Tensor:
        num_tokens, width = gate_up_TN.shape
        half, first = width // 2, gate_up_TN.storage_offset()
        size, stride = (num_tokens, half), (gate_up_TN.stride(0), 1)
        gated: torch.Tensor = silu(strided(gate_up_TN, size, stride, first))
        return gated.mul_(strided(gate_up_TN, size, stride, first + half))

    return run
