"""`select_rows` on a CPU."""

from collections.abc import Mapping

import numpy as np
import torch

from kernels.batch import StepBatch
from kernels.cpu_form import BoundOp, CpuTarget, PackedWeight
from kernels.cpu_jit import TAGS, address
from kernels.embedding.cpu_kernel import take_rows
from shared.ir import Node


def bind(node: Node, weights: Mapping[str, PackedWeight], target: CpuTarget) -> BoundOp:
    """One call."""
    dtype = target.activation_dtype
    tags = TAGS[dtype], TAGS[torch.float32], np.int32(0), TAGS[dtype]

    def run(x_TM: torch.Tensor, batch: StepBatch) -> torch.Tensor:
        rows_R = batch.logit_rows_R
        out_RM = x_TM.new_empty(len(rows_R), x_TM.shape[1])
        take_rows(
            address(x_TM, dtype),
            0,
            address(rows_R, torch.int32),
            out_RM.data_ptr(),
            *out_RM.shape,
            *tags,
        )
        return out_RM

    return run
