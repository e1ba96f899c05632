"""`rms_norm` on a CPU: one call, with the residual's addition where there is one."""

from collections.abc import Mapping

import torch

from kernels.batch import StepBatch
from kernels.cpu_form import BoundOp, CpuTarget, PackedWeight
from kernels.cpu_jit import TAGS, address
from kernels.op import integer, number
from kernels.rms_norm.cpu_kernel import add_rms_norm, rms_norm
from shared.ir import Node


def bind(node: Node, weights: Mapping[str, PackedWeight], target: CpuTarget) -> BoundOp:
    """One form for rows or heads, one for rows with a residual."""
    eps, head_dim = number(node, "eps"), integer(node, "head_dim")
    weight = weights["weight"].dense()
    size = len(weight)
    dtype = target.activation_dtype
    tag, weight_tag = TAGS[dtype], TAGS[torch.float32]

    def run_residual(
        x: torch.Tensor, residual: torch.Tensor, batch: StepBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, total = torch.empty_like(x), torch.empty_like(x)
        add_rms_norm(
            address(x, dtype), address(residual, dtype), weight.data_ptr(), out.data_ptr(), total.data_ptr(),
            len(x), size, eps, tag, weight_tag,
        )  # fmt: skip
        return out, total

    def run(x: torch.Tensor, batch: StepBatch) -> torch.Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        rms_norm(
            address(x, dtype), weight.data_ptr(), out.data_ptr(), x.numel() // size, size, eps,
            tag, weight_tag,
        )  # fmt: skip
        return out

    assert not (node.attrs["residual"] and head_dim), "heads have no residual"
    return run_residual if node.attrs["residual"] else run
