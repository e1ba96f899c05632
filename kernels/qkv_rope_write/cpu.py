"""`qkv_rope_write` on a CPU: a pair (x[i], x[i + D/2]) is a complex number, and rope one product.

q and k come out with each pair's halves side by side (x[0], x[D/2], x[1], ...): a permutation of
the head dim that is the same for both, so their dot products do not change. Nothing else reads
them: keys in the cache lie in this order.

Legend: T packed tokens, H query heads, K kv heads, D head dim, I = D / 2.
"""

from collections.abc import Mapping

import torch

from kernels.batch import StepBatch
from kernels.cpu_form import BoundOp, CpuTarget, PackedWeight
from kernels.op import integer, number, numbers
from shared.ir import Node


def bind(node: Node, weights: Mapping[str, PackedWeight], target: CpuTarget) -> BoundOp:
    """The form for one layer; rotations are made once a step and shared by layers."""
    layer, head_dim = integer(node, "layer"), integer(node, "head_dim")
    num_heads, num_kv_heads = integer(node, "num_heads"), integer(node, "num_kv_heads")
    num_turned = num_heads + num_kv_heads
    q_width, k_width = num_heads * head_dim, num_kv_heads * head_dim
    turned_width = q_width + k_width
    norm = _bind_norm(node, weights, target)
    rotations = _Rotations(numbers(node, "inv_freq"), number(node, "attention_scaling"))
    kv_dtype = target.kv_dtype
    half = head_dim // 2
    make_complex, index_copy_ = torch.ops.aten.complex.default, torch.ops.aten.index_copy_.default

    def run(qkv_TN: torch.Tensor, batch: StepBatch) -> tuple[torch.Tensor, None]:
        num_tokens = qkv_TN.shape[0]
        slots_T = _slots(batch)
        turned = qkv_TN.narrow(1, 0, turned_width)
        if norm is not None:
            turned = norm(turned)
        pairs = turned.view(num_tokens, num_turned, 2, half).float()
        z = make_complex(pairs.select(2, 0), pairs.select(2, 1)).mul_(rotations.of(batch))
        qk_TN = torch.view_as_real(z).view(num_tokens, turned_width).to(kv_dtype)
        k_cache, v_cache = batch.kv_caches[layer]
        k_TN = qk_TN.narrow(1, q_width, k_width)
        v_TN = qkv_TN.narrow(1, turned_width, k_width).to(kv_dtype)
        index_copy_(k_cache.view(-1, k_width), 0, slots_T, k_TN)
        index_copy_(v_cache.view(-1, k_width), 0, slots_T, v_TN)
        return qk_TN.narrow(1, 0, q_width), None

    return run


class _Rotations:
    """cos + i sin of each token's angles; angles are taken in fp64."""

    def __init__(self, inv_freq: tuple[float, ...], scaling: float) -> None:
        self._inv_freq_I = torch.tensor(inv_freq, dtype=torch.float64)
        self._scaling = scaling
        self._key = f"rope {inv_freq} {scaling}"

    def of(self, batch: StepBatch) -> torch.Tensor:
        """complex64 [T, 1, I]."""
        known: torch.Tensor | None = batch.memo.get(self._key)
        if known is None:
            angles_TI = batch.positions_T.double()[:, None] * self._inv_freq_I
            turns = torch.polar(torch.full_like(angles_TI, self._scaling), angles_TI)
            known = batch.memo[self._key] = turns.to(torch.complex64)[:, None]
        return known


def _slots(batch: StepBatch) -> torch.Tensor:
    known: torch.Tensor | None = batch.memo.get("slots")
    if known is None:
        known = batch.memo["slots"] = batch.slot_mapping_T.long()
    return known


def _bind_norm(
    node: Node, weights: Mapping[str, PackedWeight], target: CpuTarget
) -> BoundOp | None:
    if not weights:
        return None
    head_dim, eps = integer(node, "head_dim"), number(node, "eps")
    q_norm, k_norm = weights["q_norm"].dense(), weights["k_norm"].dense()
    weight_HD = torch.cat(
        (
            q_norm.expand(integer(node, "num_heads"), head_dim),
            k_norm.expand(integer(node, "num_kv_heads"), head_dim),
        )
    ).to(target.activation_dtype)
    norm = torch.ops.aten.rms_norm.default

    def run(qk_TN: torch.Tensor) -> torch.Tensor:
        heads_THD = qk_TN.view(len(qk_TN), -1, head_dim)
        result: torch.Tensor = norm(heads_THD, [head_dim], None, eps).mul_(weight_HD)
        return result

    return run
