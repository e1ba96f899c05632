"""`embedding` on a CPU: gathers rows as they are stored, and widens only those.

Legend: T packed tokens, M model dim, V vocabulary, J groups of a row.
"""

from collections.abc import Mapping

import numpy as np
import torch

from kernels.batch import StepBatch
from kernels.cpu_form import BoundOp, CpuTarget, PackedWeight
from kernels.cpu_jit import TAGS, address
from kernels.embedding.cpu_kernel import take_rows
from shared.ir import Node


def bind(node: Node, weights: Mapping[str, PackedWeight], target: CpuTarget) -> BoundOp:
    """The table stays in its layout where that is of whole bytes."""
    weight, dtype = weights["weight"], target.activation_dtype
    if weight.spec.layout in ("plain", "int8_channel", "fp8_channel"):
        return _taken(weight, dtype)
    select = torch.ops.aten.index_select.default
    if weight.spec.layout == "int8_group":
        codes_VM, scale_VJ = weight.tensors["weight"], weight.tensors["scale"]

        def gather_groups(token_ids_T: torch.Tensor, batch: StepBatch) -> torch.Tensor:
            scale_TJ = select(scale_VJ, 0, token_ids_T)
            rows_TM = codes_VM[token_ids_T].float()
            rows_TM.view(*scale_TJ.shape, -1).mul_(scale_TJ[..., None])
            return rows_TM.to(dtype)

        return gather_groups
    dense_VM = weight.dense().to(dtype)
    return lambda token_ids_T, batch: select(dense_VM, 0, token_ids_T)


def _taken(weight: PackedWeight, dtype: torch.dtype) -> BoundOp:
    table_VM = weight.tensors["weight"].contiguous()
    scale_V = weight.tensors.get("scale")
    tags = TAGS[table_VM.dtype], TAGS[torch.float32], np.int32(0), TAGS[dtype]

    def run(token_ids_T: torch.Tensor, batch: StepBatch) -> torch.Tensor:
        size = len(token_ids_T), table_VM.shape[1]
        out_TM = torch.empty(size, dtype=dtype)
        take_rows(
            table_VM.data_ptr(), address(scale_V, torch.float32), address(token_ids_T, torch.int32),
            out_TM.data_ptr(), *size, *tags,
        )  # fmt: skip
        return out_TM

    return run
