"""`attention` on a CPU: one query a sequence by our own kernel, several by torch's flash attention.

A step is cut into groups once, and every layer uses them:

    one query token a sequence   all of them together, straight from their blocks
    several query tokens         same number and same length together; blocks that lie side by side are
                                 read where they are, others are gathered first

Legend: T packed tokens, S sequences, Q query tokens of a sequence, J cached tokens, H query heads,
K kv heads, D head dim.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from kernels.attention.cpu_kernel import one_query
from kernels.batch import StepBatch
from kernels.cpu_form import BoundOp, CpuTarget, PackedWeight
from kernels.cpu_jit import TAGS, address
from kernels.op import integer, number
from shared.ir import Node

_INDEX_TAG = np.int32(0)


@dataclass(slots=True)
class _Singles:
    """Sequences with one query token: its packed token, and the sequence's row, int32 [S]."""

    tokens_S: torch.Tensor
    rows_S: torch.Tensor


@dataclass(slots=True)
class _Group:
    """Sequences with several query tokens that are attended together.

    Args:
        tokens: their packed tokens, sequence by sequence; a slice where they lie so.
        blocks: their blocks, sequence by sequence; a slice where they lie so.
        num_keys: J, cached tokens of each.
        first_key: cached tokens before it are seen by no query.
        mask: added to logits, [1, 1, Q, J - first_key]; None: all are visible, or `is_causal`.
    """

    num_sequences: int
    num_queries: int
    tokens: slice | torch.Tensor
    blocks: slice | torch.Tensor
    num_keys: int
    first_key: int
    mask: torch.Tensor | None
    is_causal: bool


@dataclass(slots=True)
class _Cut:
    """A step's sequences, by how they are attended."""

    singles: _Singles | None
    groups: list[_Group]


def bind(node: Node, weights: Mapping[str, PackedWeight], target: CpuTarget) -> BoundOp:
    """The form for one layer."""
    layer, window = integer(node, "layer"), integer(node, "window")
    num_heads, num_kv_heads = integer(node, "num_heads"), integer(node, "num_kv_heads")
    head_dim, scale = integer(node, "head_dim"), number(node, "scale")
    soft_cap, dtype = number(node, "soft_cap"), target.activation_dtype
    heads = (num_heads, num_kv_heads, head_dim)
    kv_dtype = target.kv_dtype
    tag, kv_tag = TAGS[dtype], TAGS[kv_dtype]
    scale_fp32, soft_cap_fp32 = np.float32(scale), np.float32(soft_cap)

    def attend(group: _Group, q_TN: torch.Tensor, batch: StepBatch) -> torch.Tensor:
        k, v = (_keys(cache, group, num_kv_heads, head_dim) for cache in batch.kv_caches[layer])
        if q_TN.dtype != k.dtype:
            q_TN = q_TN.to(k.dtype)
        if soft_cap:
            return _soft_capped(group, q_TN, k, v, heads, scale, soft_cap).to(dtype)
        return _many_queries(group, q_TN, k, v, heads, scale).to(dtype)

    def run(q_TN: torch.Tensor, kv: None, batch: StepBatch) -> torch.Tensor:
        cut = _cut_of(batch, window, kv_dtype)
        if cut.singles is None and len(cut.groups) == 1 and isinstance(cut.groups[0].tokens, slice):
            return attend(cut.groups[0], q_TN, batch)
        out_TN = torch.empty_like(q_TN)
        for group in cut.groups:
            out_TN[group.tokens] = attend(group, q_TN[group.tokens], batch)
        if cut.singles is not None:
            tables, (k_cache, v_cache) = batch.block_tables_SB, batch.kv_caches[layer]
            one_query(
                address(q_TN, dtype), cut.singles.tokens_S.data_ptr(), tables.data_ptr(),
                cut.singles.rows_S.data_ptr(), address(batch.seq_lens_S, torch.int32), address(k_cache, kv_dtype),
                address(v_cache, kv_dtype), out_TN.data_ptr(), len(cut.singles.rows_S), tables.stride(0),
                k_cache.shape[1], *heads, scale_fp32, window, soft_cap_fp32, tag, kv_tag, _INDEX_TAG,
            )  # fmt: skip
        return out_TN

    return run


def _keys(cache: torch.Tensor, group: _Group, num_kv_heads: int, head_dim: int) -> torch.Tensor:
    """[S, K, J - first_key, D] of a cache [num_blocks, block_tokens, K, D]."""
    blocks = group.blocks
    token = num_kv_heads * head_dim
    block = cache.shape[1] * token
    first = group.first_key * token
    if isinstance(blocks, slice):
        found, sequence, first = cache, 0, first + blocks.start * block
    else:
        found = cache.index_select(0, blocks)
        sequence = len(blocks) // group.num_sequences * block
    # One call: a view of a view is as dear as a small product.
    size = (group.num_sequences, num_kv_heads, group.num_keys - group.first_key, head_dim)
    return torch.as_strided(found, size, (sequence, head_dim, token, 1), first)


def _many_queries(
    group: _Group,
    q_TN: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: tuple[int, int, int],
    scale: float,
) -> torch.Tensor:
    num_heads, num_kv_heads, head_dim = heads
    q = q_TN.view(group.num_sequences, group.num_queries, num_heads, head_dim).transpose(1, 2)
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, group.mask, 0.0, group.is_causal, scale=scale, enable_gqa=num_heads != num_kv_heads
    )
    return out.transpose(1, 2).reshape(q_TN.shape)


def _soft_capped(
    group: _Group,
    q_TN: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: tuple[int, int, int],
    scale: float,
    soft_cap: float,
) -> torch.Tensor:
    _, num_kv_heads, head_dim = heads
    shape = (group.num_sequences, group.num_queries, num_kv_heads, -1, head_dim)
    q = q_TN.reshape(shape).permute(0, 2, 3, 1, 4).float()
    logits = (q @ k.float().unsqueeze(2).transpose(-1, -2)).mul_(scale / soft_cap)
    logits = logits.tanh_().mul_(soft_cap)
    mask = group.mask
    if group.is_causal:
        positions = torch.arange(group.num_queries)
        mask = _visibility(positions, positions, 0, torch.float32)
    if mask is not None:
        logits = logits + mask.unsqueeze(2).float()
    out = logits.softmax(-1) @ v.float().unsqueeze(2)
    return out.permute(0, 3, 1, 2, 4).reshape(q_TN.shape)


def _cut_of(batch: StepBatch, window: int, dtype: torch.dtype) -> _Cut:
    key = f"attention {window} {dtype}"
    known: _Cut | None = batch.memo.get(key)
    if known is None:
        known = batch.memo[key] = _cut(batch, window, dtype)
    return known


def _cut(batch: StepBatch, window: int, dtype: torch.dtype) -> _Cut:
    """The step's cut for layers with this window."""
    counts_S = batch.query_start_S1.diff()
    rows_S = (counts_S == 1).nonzero()[:, 0].int()
    singles = _Singles(batch.query_start_S1[rows_S], rows_S) if len(rows_S) else None
    if len(rows_S) == len(counts_S):
        return _Cut(singles, [])
    starts: list[int] = batch.query_start_S1.tolist()
    lengths: list[int] = batch.seq_lens_S.tolist()
    rows_by_kind: dict[tuple[int, int], list[int]] = {}
    for row, (start, end) in enumerate(itertools.pairwise(starts)):
        if end - start > 1:
            rows_by_kind.setdefault((end - start, lengths[row]), []).append(row)
    groups = [
        _group(batch, rows, num_queries, length, starts, window, dtype)
        for (num_queries, length), rows in rows_by_kind.items()
    ]
    return _Cut(singles, groups)


def _group(
    batch: StepBatch,
    rows: list[int],
    num_queries: int,
    length: int,
    starts: list[int],
    window: int,
    dtype: torch.dtype,
) -> _Group:
    block_tokens = batch.kv_caches[0][0].shape[1]
    first_key = 0
    if window and len(rows) == 1:
        first_key = max(0, length - num_queries - window + 1)
    is_whole = num_queries == length and (not window or window >= length)
    mask = None
    if not is_whole:
        queries_Q = torch.arange(length - num_queries, length)
        mask = _visibility(queries_Q, torch.arange(first_key, length), window, dtype)
    return _Group(
        num_sequences=len(rows),
        num_queries=num_queries,
        tokens=_packed_tokens(rows, num_queries, starts),
        blocks=_blocks(batch, rows, -(-length // block_tokens)),
        num_keys=length,
        first_key=first_key,
        mask=mask,
        is_causal=is_whole,
    )


def _packed_tokens(rows: list[int], num_queries: int, starts: list[int]) -> slice | torch.Tensor:
    first = [starts[row] for row in rows]
    if all(b - a == num_queries for a, b in itertools.pairwise(first)):
        return slice(first[0], first[-1] + num_queries)
    return (torch.tensor(first)[:, None] + torch.arange(num_queries)).flatten()


def _blocks(batch: StepBatch, rows: list[int], num_blocks: int) -> slice | torch.Tensor:
    if len(rows) == 1:
        ids: list[int] = batch.block_tables_SB[rows[0], :num_blocks].tolist()
        if all(b - a == 1 for a, b in itertools.pairwise(ids)):
            return slice(ids[0], ids[-1] + 1)
        return torch.tensor(ids)
    return batch.block_tables_SB[rows, :num_blocks].long().flatten()


def _visibility(
    queries_Q: torch.Tensor, keys_J: torch.Tensor, window: int, dtype: torch.dtype
) -> torch.Tensor:
    """[1, 1, Q, J]: 0 where the query sees the key, -inf elsewhere."""
    distance_QJ = queries_Q[:, None] - keys_J
    hidden_QJ = distance_QJ < 0
    if window:
        hidden_QJ |= distance_QJ >= window
    mask_QJ = torch.zeros(hidden_QJ.shape, dtype=dtype).masked_fill_(hidden_QJ, float("-inf"))
    return mask_QJ[None, None]
