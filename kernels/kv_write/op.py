"""`kv_write`: keys and values go to their tokens' slots in the layer's cache.

    cache[slot // block_tokens, slot % block_tokens] = k[t], v[t]   where slot = slot_mapping[t]

Attributes: layer, num_kv_heads, head_dim. The output is an effect: attention names it, so that no
pass moves it past the write.
Source: Kwon et al. 2023, "PagedAttention", section 4.
"""

from collections.abc import Mapping, Sequence

import torch

from kernels.batch import StepBatch
from kernels.kv_cache import write
from kernels.op import EFFECT, Op, effect_value, integer, require_inputs, require_last
from shared.ir import Node, TensorSpec, WeightSpec


def infer(
    node: Node, inputs: tuple[TensorSpec, ...], weights: Mapping[str, WeightSpec]
) -> tuple[TensorSpec, ...]:
    """k [T, K*D], v [T, K*D] -> effect."""
    require_inputs(inputs, 2)
    integer(node, "layer")
    width = integer(node, "num_kv_heads") * integer(node, "head_dim")
    require_last(inputs[0], width, "k")
    require_last(inputs[1], width, "v")
    return (EFFECT,)


def reference(
    node: Node,
    inputs: Sequence[torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    batch: StepBatch,
) -> tuple[torch.Tensor, ...]:
    """Writes in place; values become what the cache holds."""
    write(batch.kv_caches[integer(node, "layer")], batch.slot_mapping_T, *inputs)
    return (effect_value(),)


KV_WRITE = Op("kv_write", infer, reference)
