"""`embedding` on a CPU: gathers rows as they are stored, and widens only those.

Legend: T packed tokens, M model dim, V vocabulary, J groups of a row.
"""

from collections.abc import Mapping

import torch

from kernels.batch import StepBatch
from kernels.cpu_form import BoundOp, CpuTarget, PackedWeight
from shared.ir import Node


def bind(node: Node, weights: Mapping[str, PackedWeight], target: CpuTarget) -> BoundOp:
    """The table stays in its layout where that is of whole bytes."""
    weight, dtype = weights["weight"], target.activation_dtype
    select = torch.ops.aten.index_select.default
    if weight.spec.layout == "plain":
        table_VM = weight.tensors["weight"]

        def gather(token_ids_T: torch.Tensor, batch: StepBatch) -> torch.Tensor:
            return select(table_VM, 0, token_ids_T).to(dtype)  # type: ignore[no-any-return]

        return gather
    if weight.spec.layout in ("int8_channel", "fp8_channel"):
        codes_VM, scale_V1 = weight.tensors["weight"], weight.tensors["scale"][:, None]

        def gather_scaled(token_ids_T: torch.Tensor, batch: StepBatch) -> torch.Tensor:
            rows_TM = codes_VM[token_ids_T].float()
            return rows_TM.mul_(select(scale_V1, 0, token_ids_T)).to(dtype)

        return gather_scaled
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
