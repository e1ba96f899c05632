"""`qkv_rope_write` on a CPU: one call a layer; a step's angles are turned into cos and sin once.

Legend: T packed tokens, H query heads, K kv heads, D head dim, I = D / 2.
"""

from collections.abc import Mapping

import numpy as np
import torch

from kernels.batch import StepBatch
from kernels.cpu_form import BoundOp, CpuTarget, PackedWeight
from kernels.cpu_jit import TAGS, address
from kernels.kv_cache import block_tokens, largest_code
from kernels.op import integer, number, numbers
from kernels.qkv_rope_write.cpu_kernel import rope_write, turns, write_codes
from shared.ir import Node

_INDEX_TAG, _FREQUENCY_TAG = np.int32(0), np.float64(0)


def bind(node: Node, weights: Mapping[str, PackedWeight], target: CpuTarget) -> BoundOp:
    """The form for one layer."""
    layer, head_dim = integer(node, "layer"), integer(node, "head_dim")
    num_heads, num_kv_heads = integer(node, "num_heads"), integer(node, "num_kv_heads")
    eps = number(node, "eps") if weights else 0.0
    norm_2D = None
    if weights:
        norm_2D = torch.stack([weights[role].dense() for role in ("q_norm", "k_norm")])
    angles = _Turns(numbers(node, "inv_freq"), number(node, "attention_scaling"))
    dtype = target.activation_dtype

    def run(qkv_TN: torch.Tensor, batch: StepBatch) -> tuple[torch.Tensor, None]:
        q_TN = qkv_TN.new_empty(len(qkv_TN), num_heads * head_dim)
        k, v, *scales = cache = batch.kv_caches[layer]
        slots_T = batch.slot_mapping_T
        size = block_tokens(cache)
        if scales:  # a head is encoded when all of it is known
            size = 1
            k, v = (torch.empty(len(qkv_TN), num_kv_heads * head_dim) for _ in "kv")
            slots_T = torch.arange(len(qkv_TN), dtype=torch.int32)
        rope_write(
            address(qkv_TN, dtype), angles.of(batch).data_ptr(), address(slots_T, torch.int32),
            address(norm_2D, torch.float32), q_TN.data_ptr(), address(k, k.dtype),
            address(v, k.dtype), len(qkv_TN), num_heads, num_kv_heads, head_dim, size, eps,
            TAGS[dtype], TAGS[k.dtype], _INDEX_TAG, TAGS[torch.float32],
        )  # fmt: skip
        if scales:
            slots_at = address(batch.slot_mapping_T, torch.int32)
            for new, stored, scale in zip((k, v), cache[:2], scales, strict=True):
                write_codes(
                    address(new, torch.float32), slots_at, address(stored, stored.dtype),
                    address(scale, torch.float32), len(qkv_TN), num_kv_heads, head_dim,
                    block_tokens(cache), np.float32(largest_code(stored.dtype)), TAGS[torch.float32],
                    TAGS[stored.dtype], _INDEX_TAG,
                )  # fmt: skip
        return q_TN, None

    return run


class _Turns:
    """cos, then sin, of each token's angles."""

    def __init__(self, inv_freq: tuple[float, ...], scaling: float) -> None:
        self._inv_freq_I = torch.tensor(inv_freq, dtype=torch.float64)
        self._scaling = scaling
        self._key = f"rope {inv_freq} {scaling}"

    def of(self, batch: StepBatch) -> torch.Tensor:
        """fp32 [T, 2, I]."""
        known: torch.Tensor | None = batch.memo.get(self._key)
        if known is None:
            num_tokens, half = len(batch.positions_T), len(self._inv_freq_I)
            known = batch.memo[self._key] = torch.empty(num_tokens, 2, half)
            turns(
                address(batch.positions_T, torch.int32), self._inv_freq_I.data_ptr(), self._scaling,
                known.data_ptr(), num_tokens, half, _INDEX_TAG, _FREQUENCY_TAG, TAGS[torch.float32],
            )  # fmt: skip
        return known
