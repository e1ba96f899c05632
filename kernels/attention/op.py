"""`attention`: each packed query token over its sequence's cached keys, causal.

    l[j] = scale * q . k[j];  soft-capped: l[j] = cap * tanh(l[j] / cap), where cap > 0
    p = softmax over the visible j of l;  y = sum_j p[j] * v[j]
    visible to a query at position p:  max(0, p - window + 1) <= j <= p   (window 0: from 0)

Query head h reads key-value head h // (H / K).
Attributes: layer, num_heads, num_kv_heads, head_dim, scale, window, soft_cap.
Source: Vaswani et al. 2017, section 3.2; Ainslie et al. 2023 (GQA); Kwon et al. 2023,
"PagedAttention", section 4; soft cap: Gemma 2 report, section 2; window: Mistral 7B, section 2.
"""

import itertools
from collections.abc import Mapping, Sequence

import torch

from kernels.batch import StepBatch
from kernels.kv_cache import block_tokens, read
from kernels.op import EFFECT, Op, integer, number, require_inputs, require_last, widened
from shared.ir import Node, TensorSpec, WeightSpec


def infer(
    node: Node, inputs: tuple[TensorSpec, ...], weights: Mapping[str, WeightSpec]
) -> tuple[TensorSpec, ...]:
    """q [T, H*D], kv effect -> [T, H*D]."""
    require_inputs(inputs, 2)
    integer(node, "layer"), integer(node, "window"), number(node, "soft_cap"), number(node, "scale")
    num_heads, num_kv_heads = integer(node, "num_heads"), integer(node, "num_kv_heads")
    assert num_heads % num_kv_heads == 0, f"{num_heads} heads do not share {num_kv_heads}"
    require_last(inputs[0], num_heads * integer(node, "head_dim"), "q")
    assert inputs[1] == EFFECT, "the second input is no cache write"
    return (inputs[0],)


def reference(
    node: Node,
    inputs: Sequence[torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    batch: StepBatch,
) -> tuple[torch.Tensor, ...]:
    """The formula, one sequence after the other."""
    q_THD = inputs[0].view(-1, integer(node, "num_heads"), integer(node, "head_dim"))
    out_THD = torch.empty_like(q_THD)
    starts = batch.query_start_S1.tolist()
    for row, (start, end) in enumerate(itertools.pairwise(starts)):
        if start == end:
            continue
        length = int(batch.seq_lens_S[row])
        k_JKD, v_JKD = cached(node, batch, row, length)
        out_THD[start:end] = attended(
            node, q_THD[start:end], k_JKD, v_JKD, batch.positions_T[start:end]
        )
    return (out_THD.flatten(-2),)


def cached(
    node: Node, batch: StepBatch, row: int, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A sequence's first `length` keys and values, [length, K, D] each."""
    cache = batch.kv_caches[integer(node, "layer")]
    blocks = -(-length // block_tokens(cache))
    return read(cache, batch.block_tables_SB[row, :blocks], length)


def attended(
    node: Node,
    q_QHD: torch.Tensor,
    k_JKD: torch.Tensor,
    v_JKD: torch.Tensor,
    positions_Q: torch.Tensor,
) -> torch.Tensor:
    """One sequence's queries, at `positions_Q`, over its keys, which lie at positions 0, 1, ..."""
    q = widened(q_QHD)
    group = integer(node, "num_heads") // integer(node, "num_kv_heads")
    k_JHD = k_JKD.to(q.dtype).repeat_interleave(group, 1)
    v_JHD = v_JKD.to(q.dtype).repeat_interleave(group, 1)
    logits_HQJ = torch.einsum("qhd,jhd->hqj", q, k_JHD) * number(node, "scale")
    soft_cap, window = number(node, "soft_cap"), integer(node, "window")
    if soft_cap:
        logits_HQJ = soft_cap * torch.tanh(logits_HQJ / soft_cap)
    distance_QJ = positions_Q[:, None] - torch.arange(len(k_JKD), device=q.device)
    visible_QJ = distance_QJ >= 0
    if window:
        visible_QJ = visible_QJ & (distance_QJ < window)
    weights_HQJ = logits_HQJ.masked_fill(~visible_QJ, float("-inf")).softmax(-1)
    return torch.einsum("hqj,jhd->qhd", weights_HQJ, v_JHD).to(q_QHD.dtype)


ATTENTION = Op("attention", infer, reference)
