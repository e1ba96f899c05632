"""`select_rows` on a CPU."""

from collections.abc import Mapping

import torch

from kernels.batch import StepBatch
from kernels.cpu_form import BoundOp, CpuTarget, PackedWeight
from shared.ir import Node


def bind(node: Node, weights: Mapping[str, PackedWeight], target: CpuTarget) -> BoundOp:
    """One gather."""
    select = torch.ops.aten.index_select.default

    def run(x_TM: torch.Tensor, batch: StepBatch) -> torch.Tensor:
        rows: torch.Tensor = select(x_TM, 0, batch.logit_rows_R)
        return rows

    return run
