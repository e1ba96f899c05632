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
    # Every view is a call: each is made in one step from what it views.
    strided, cast = torch.ops.aten.as_strided.default, torch.ops.aten._to_copy.default
    is_cast = target.activation_dtype != kv_dtype

    def run(qkv_TN: torch.Tensor, batch: StepBatch) -> tuple[torch.Tensor, None]:
        num_tokens = qkv_TN.shape[0]
        slots_T = _slots(batch)
        row, first = qkv_TN.stride(0), qkv_TN.storage_offset()
        turned, turned_row = qkv_TN, row
        turned_first = first
        if norm is not None:
            turned = norm(strided(qkv_TN, (num_tokens, turned_width), (row, 1), first))
            turned_row, turned_first = turned_width, 0
        if turned.dtype != torch.float32:
            turned = turned.float()
            turned_row, turned_first = turned.stride(0), 0
        size, stride = (num_tokens, num_turned, half), (turned_row, head_dim, 1)
        z = make_complex(
            strided(turned, size, stride, turned_first),
            strided(turned, size, stride, turned_first + half),
        ).mul_(rotations.of(batch))
        qk = torch.view_as_real(z)
        if kv_dtype != torch.float32:
            qk = cast(qk, dtype=kv_dtype)
        k_TN = strided(qk, (num_tokens, k_width), (turned_width, 1), q_width)
        v_TN = strided(qkv_TN, (num_tokens, k_width), (row, 1), first + turned_width)
        if is_cast:
            v_TN = cast(v_TN, dtype=kv_dtype)
        k_cache, v_cache = batch.kv_caches[layer]
        slots, flat = k_cache.shape[0] * k_cache.shape[1], (k_width, 1)
        index_copy_(strided(k_cache, (slots, k_width), flat), 0, slots_T, k_TN)
        index_copy_(strided(v_cache, (slots, k_width), flat), 0, slots_T, v_TN)
        return strided(qk, (num_tokens, q_width), (turned_width, 1), 0), None

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
        return result.view(len(qk_TN), -1)

    return run
