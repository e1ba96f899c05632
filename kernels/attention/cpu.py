"""`attention` on a CPU: sequences of one shape together, through torch's flash attention.

A step is cut into groups once, and every layer uses them:

    one query token a sequence   lengths of the same power of two together; the G query heads of a
                                 kv head stand as its G queries, shorter sequences are masked
    several query tokens         same number and same length together

Blocks that lie side by side are read where they are; others are gathered first.

Legend: T packed tokens, S sequences, Q query tokens of a sequence, J cached tokens, H query heads,
K kv heads, G = H / K, D head dim.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from kernels.batch import StepBatch
from kernels.cpu_form import BoundOp, CpuTarget, PackedWeight
from kernels.op import integer, number
from shared.ir import Node

_SMALLEST_BUCKET = 256


@dataclass(slots=True)
class _Group:
    """Sequences that are attended together.

    Args:
        tokens: their packed tokens, sequence by sequence; a slice where they lie so.
        blocks: their blocks, sequence by sequence; a slice where they lie so.
        num_keys: J, cached tokens of the longest.
        first_key: cached tokens before it are seen by no query.
        mask: added to logits, [S or 1, 1, Q or 1, J - first_key]; None: all are visible, or
            `is_causal`.
    """

    num_sequences: int
    num_queries: int
    tokens: slice | torch.Tensor
    blocks: slice | torch.Tensor
    num_keys: int
    first_key: int
    mask: torch.Tensor | None
    is_causal: bool


def bind(node: Node, weights: Mapping[str, PackedWeight], target: CpuTarget) -> BoundOp:
    """The form for one layer."""
    layer, window = integer(node, "layer"), integer(node, "window")
    num_heads, num_kv_heads = integer(node, "num_heads"), integer(node, "num_kv_heads")
    head_dim, scale = integer(node, "head_dim"), number(node, "scale")
    soft_cap, dtype = number(node, "soft_cap"), target.activation_dtype
    heads = (num_heads, num_kv_heads, head_dim)

    def attend(group: _Group, q_TN: torch.Tensor, batch: StepBatch) -> torch.Tensor:
        k, v = (_keys(cache, group, num_kv_heads, head_dim) for cache in batch.kv_caches[layer])
        if soft_cap:
            return _soft_capped(group, q_TN, k, v, heads, scale, soft_cap).to(dtype)
        if group.num_queries == 1:
            return _one_query(group, q_TN, k, v, heads, scale, dtype)
        return _many_queries(group, q_TN, k, v, heads, scale).to(dtype)

    def run(q_TN: torch.Tensor, kv: None, batch: StepBatch) -> torch.Tensor:
        groups = _groups(batch, window, q_TN.dtype)
        if len(groups) == 1 and isinstance(groups[0].tokens, slice):
            return attend(groups[0], q_TN, batch)
        out_TN = torch.empty(q_TN.shape, dtype=dtype)
        for group in groups:
            out_TN[group.tokens] = attend(group, q_TN[group.tokens], batch)
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


def _one_query(
    group: _Group,
    q_TN: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: tuple[int, int, int],
    scale: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    num_heads, num_kv_heads, head_dim = heads
    queries = num_heads // num_kv_heads
    size = (len(q_TN), num_kv_heads, queries, head_dim)
    stride = (q_TN.stride(0), queries * head_dim, head_dim, 1)
    q = torch.as_strided(q_TN, size, stride, q_TN.storage_offset())
    mask = group.mask
    if mask is not None:
        mask = mask.expand(-1, -1, queries, -1)
    out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(
        q, k, v, 0.0, False, attn_mask=mask, scale=scale
    )[0]
    # Cast and put into order in one call.
    ordered: torch.Tensor = torch.ops.aten._to_copy.default(
        out, dtype=dtype, memory_format=torch.contiguous_format
    )
    return ordered.view(q_TN.shape)


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
        mask = _visibility(positions[None], positions, 0, torch.float32)
    if mask is not None:
        logits = logits + mask.unsqueeze(2).float()
    out = logits.softmax(-1) @ v.float().unsqueeze(2)
    return out.permute(0, 3, 1, 2, 4).reshape(q_TN.shape)


def _groups(batch: StepBatch, window: int, dtype: torch.dtype) -> list[_Group]:
    key = f"attention {window} {dtype}"
    known: list[_Group] | None = batch.memo.get(key)
    if known is None:
        known = batch.memo[key] = _cut(batch, window, dtype)
    return known


def _cut(batch: StepBatch, window: int, dtype: torch.dtype) -> list[_Group]:
    """The step's groups for layers with this window."""
    starts: list[int] = batch.query_start_S1.tolist()
    lengths: list[int] = batch.seq_lens_S.tolist()
    rows_by_kind: dict[tuple[int, int], list[int]] = {}
    for row, (start, end) in enumerate(itertools.pairwise(starts)):
        if start == end:
            continue
        length = lengths[row]
        bucket = max(_SMALLEST_BUCKET, 1 << (length - 1).bit_length())
        kind = (1, bucket) if end - start == 1 else (end - start, length)
        rows_by_kind.setdefault(kind, []).append(row)
    return [
        _group(batch, rows, num_queries, starts, lengths, window, dtype)
        for (num_queries, _), rows in rows_by_kind.items()
    ]


def _group(
    batch: StepBatch,
    rows: list[int],
    num_queries: int,
    starts: list[int],
    lengths: list[int],
    window: int,
    dtype: torch.dtype,
) -> _Group:
    block_tokens = batch.kv_caches[0][0].shape[1]
    longest = max(lengths[row] for row in rows)
    num_blocks = -(-longest // block_tokens)
    first_key = 0
    if window and len(rows) == 1:
        first_key = max(0, longest - num_queries - window + 1)
    group = _Group(
        num_sequences=len(rows),
        num_queries=num_queries,
        tokens=_packed_tokens(rows, num_queries, starts),
        blocks=_blocks(batch, rows, lengths, num_blocks, block_tokens),
        num_keys=longest,
        first_key=first_key,
        mask=None,
        is_causal=False,
    )
    is_whole = num_queries == longest and num_queries > 1
    if is_whole and (not window or window >= longest):
        group.is_causal = True
    elif num_queries > 1 or len(rows) > 1:
        ends = torch.tensor([lengths[row] for row in rows])
        queries_SQ = ends[:, None] - num_queries + torch.arange(num_queries)
        if num_queries > 1:
            queries_SQ = queries_SQ[:1]  # all of one length
        group.mask = _visibility(queries_SQ, torch.arange(first_key, longest), window, dtype)
    return group


def _packed_tokens(rows: list[int], num_queries: int, starts: list[int]) -> slice | torch.Tensor:
    first = [starts[row] for row in rows]
    if all(b - a == num_queries for a, b in itertools.pairwise(first)):
        return slice(first[0], first[-1] + num_queries)
    return (torch.tensor(first)[:, None] + torch.arange(num_queries)).flatten()


def _blocks(
    batch: StepBatch, rows: list[int], lengths: list[int], num_blocks: int, block_tokens: int
) -> slice | torch.Tensor:
    if len(rows) == 1:
        ids: list[int] = batch.block_tables_SB[rows[0], :num_blocks].tolist()
        if all(b - a == 1 for a, b in itertools.pairwise(ids)):
            return slice(ids[0], ids[-1] + 1)
        return torch.tensor(ids)
    tables = batch.block_tables_SB[rows, :num_blocks].long()
    used = torch.tensor([-(-lengths[row] // block_tokens) for row in rows])
    # What is past a sequence's last block is undefined: any block that exists will do.
    return tables.masked_fill_(torch.arange(num_blocks) >= used[:, None], 0).flatten()


def _visibility(
    queries_SQ: torch.Tensor, keys_J: torch.Tensor, window: int, dtype: torch.dtype
) -> torch.Tensor:
    """[S, 1, Q, J]: 0 where the query sees the key, -inf elsewhere."""
    distance = queries_SQ[:, None, :, None] - keys_J
    hidden = distance < 0
    if window:
        hidden |= distance >= window
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
