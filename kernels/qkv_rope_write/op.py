"""`qkv_rope_write`: between the joined projection and attention; norm, rotate, write to the cache.

    q, k, v = qkv
    q, k = rms_norm(q, q_norm), rms_norm(k, k_norm)    per head, where there are such weights
    q, k = rope(q), rope(k);  kv_write(k, v)

Weights: q_norm [D], k_norm [D], both or none. Attributes: layer, num_heads, num_kv_heads, head_dim,
inv_freq, attention_scaling, eps. The meaning is that of the ops that it stands for.
"""

from collections.abc import Mapping, Sequence

import torch

from kernels.batch import StepBatch
from kernels.kv_cache import write
from kernels.op import EFFECT, Op, effect_value, integer, number, require_inputs, require_last
from kernels.rms_norm.op import normed
from kernels.rope.op import require_rope, rotated
from shared.ir import Node, TensorSpec, WeightSpec


def infer(
    node: Node, inputs: tuple[TensorSpec, ...], weights: Mapping[str, WeightSpec]
) -> tuple[TensorSpec, ...]:
    """qkv [T, (H+2K)*D] -> q [T, H*D], effect."""
    require_inputs(inputs, 1)
    require_rope(node)
    integer(node, "layer"), number(node, "eps")
    num_heads, head_dim = integer(node, "num_heads"), integer(node, "head_dim")
    require_last(inputs[0], (num_heads + 2 * integer(node, "num_kv_heads")) * head_dim, "qkv")
    assert set(weights) in (set(), {"q_norm", "k_norm"}), f"weights are {sorted(weights)}"
    for role, weight in weights.items():
        assert weight.shape == (head_dim,), f"{role} is not [{head_dim}]"
    return TensorSpec((*inputs[0].dims[:-1], num_heads * head_dim), inputs[0].dtype), EFFECT


def reference(
    node: Node,
    inputs: Sequence[torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    batch: StepBatch,
) -> tuple[torch.Tensor, ...]:
    """The ops that it stands for, one after the other."""
    head_dim, eps = integer(node, "head_dim"), number(node, "eps")
    kv_width = integer(node, "num_kv_heads") * head_dim
    sizes = [inputs[0].shape[-1] - 2 * kv_width, kv_width, kv_width]
    q, k, v = torch.split_with_sizes(inputs[0], sizes, -1)
    if weights:
        q, k = (
            normed(q, weights["q_norm"], eps, head_dim),
            normed(k, weights["k_norm"], eps, head_dim),
        )
    q, k = rotated(node, q, batch.positions_T), rotated(node, k, batch.positions_T)
    write(batch.kv_caches[integer(node, "layer")], batch.slot_mapping_T, k, v)
    return q, effect_value()


QKV_ROPE_WRITE = Op("qkv_rope_write", infer, reference)
