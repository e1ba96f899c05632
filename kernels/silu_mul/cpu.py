"""`silu_mul` on a CPU."""

from collections.abc import Mapping

import torch

from kernels.batch import StepBatch
from kernels.cpu_form import BoundOp, CpuTarget, PackedWeight
from kernels.cpu_jit import TAGS, address
from kernels.silu_mul.cpu_kernel import silu_mul
from shared.ir import Node


def bind(node: Node, weights: Mapping[str, PackedWeight], target: CpuTarget) -> BoundOp:
    """One call."""
    dtype = target.activation_dtype
    tag = TAGS[dtype]

    def run(gate_up_TN: torch.Tensor, batch: StepBatch) -> torch.Tensor:
        num_tokens, width = gate_up_TN.shape
        out_TF = gate_up_TN.new_empty(num_tokens, width // 2)
        silu_mul(address(gate_up_TN, dtype), out_TF.data_ptr(), num_tokens, width // 2, tag)
        return out_TF

    return run
