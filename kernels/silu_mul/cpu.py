"""`silu_mul` on a CPU."""

from collections.abc import Mapping

import torch

from kernels.batch import StepBatch
from kernels.cpu_form import BoundOp, CpuTarget, PackedWeight
from shared.ir import Node


def bind(node: Node, weights: Mapping[str, PackedWeight], target: CpuTarget) -> BoundOp:
    """Two calls: silu of the first half, times the second."""
    silu, narrow = torch.ops.aten.silu.default, torch.narrow

    def run(gate_up_TN: torch.Tensor, batch: StepBatch) -> torch.Tensor:
        half = gate_up_TN.shape[1] // 2
        gated: torch.Tensor = silu(narrow(gate_up_TN, 1, 0, half))
        return gated.mul_(narrow(gate_up_TN, 1, half, half))

    return run
