"""`attention` on a CPU: our own kernels over the cache's blocks, one for single queries, one for tiles of them.

A step is cut once, and every layer uses the cut. Legend: T packed tokens, S sequences, I tiles of queries,
H query heads, K kv heads, D head dim.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from kernels.attention.cpu_kernel import one_query
from kernels.attention.cpu_kernel_tile import TILE_QUERIES, many_queries
from kernels.batch import StepBatch
from kernels.cpu_form import BoundOp, CpuTarget, PackedWeight
from kernels.cpu_jit import TAGS, address, has_feature
from kernels.kv_cache import block_tokens
from kernels.op import integer, number
from shared.ir import Node

_INDEX_TAG = np.int32(0)


@dataclass(frozen=True, slots=True)
class _Cut:
    """A step's sequences by their number of query tokens; all int32.

    Args:
        single_rows_S: sequences with one query, by row, and `single_tokens_S`, its packed token.
        tile_rows_I: sequence of each tile of the others, and `tile_starts_I`, its first query there.
    """

    single_rows_S: torch.Tensor
    single_tokens_S: torch.Tensor
    tile_rows_I: torch.Tensor
    tile_starts_I: torch.Tensor


def bind(node: Node, weights: Mapping[str, PackedWeight], target: CpuTarget) -> BoundOp:
    """The form for one layer."""
    layer, dtype, kv_dtype = integer(node, "layer"), target.activation_dtype, target.kv_dtype
    heads = integer(node, "num_heads"), integer(node, "num_kv_heads"), integer(node, "head_dim")
    how = (
        np.float32(number(node, "scale")),
        integer(node, "window"),
        np.float32(number(node, "soft_cap")),
    )
    tags = TAGS[dtype], TAGS[kv_dtype], _INDEX_TAG
    is_paired = dtype == kv_dtype == torch.bfloat16 and has_feature("avx512bf16")
    operand_tag = TAGS[torch.bfloat16 if is_paired else torch.float32]

    def run(q_TN: torch.Tensor, kv: None, batch: StepBatch) -> torch.Tensor:
        cut = _cut_of(batch, len(q_TN))
        out_TN = torch.empty_like(q_TN)
        q_at, out_at, tables = address(q_TN, dtype), out_TN.data_ptr(), batch.block_tables_SB
        k_cache, v_cache, *scales = cache = batch.kv_caches[layer]
        k_at, v_at = address(k_cache, kv_dtype), address(v_cache, kv_dtype)
        scales_at = [address(part, torch.float32) for part in scales] or [0, 0]
        tables_at, lens_at = address(tables, torch.int32), address(batch.seq_lens_S, torch.int32)
        sizes = tables.stride(0), block_tokens(cache)
        if len(cut.single_rows_S):
            one_query(
                q_at, cut.single_tokens_S.data_ptr(), tables_at, cut.single_rows_S.data_ptr(), lens_at,
                k_at, v_at, *scales_at, out_at, len(cut.single_rows_S), *sizes, *heads, *how, *tags,
            )  # fmt: skip
        if len(cut.tile_rows_I):
            many_queries(
                q_at, cut.tile_rows_I.data_ptr(), cut.tile_starts_I.data_ptr(),
                address(batch.query_start_S1, torch.int32), tables_at, lens_at, k_at, v_at,
                *scales_at, out_at, len(cut.tile_rows_I), *sizes, *heads, *how, *tags, operand_tag,
            )  # fmt: skip
        return out_TN

    return run


def _cut_of(batch: StepBatch, num_tokens: int) -> _Cut:
    known: _Cut | None = batch.memo.get("attention")
    if known is None:
        is_decode = num_tokens == len(batch.seq_lens_S)
        known = batch.memo["attention"] = _decode_cut(num_tokens) if is_decode else _cut(batch)
    return known


def _decode_cut(num_sequences: int) -> _Cut:
    """One query each: known from their number alone."""
    indices_S, none = (torch.arange(size, dtype=torch.int32) for size in (num_sequences, 0))
    return _Cut(indices_S, indices_S, none, none)


def _cut(batch: StepBatch) -> _Cut:
    counts_S = batch.query_start_S1.diff()
    singles_S = (counts_S == 1).nonzero()[:, 0].int()
    num_tiles_S = torch.where(counts_S > 1, (counts_S + TILE_QUERIES - 1) // TILE_QUERIES, 0)
    rows_I = torch.repeat_interleave(torch.arange(len(counts_S)), num_tiles_S)
    tile_I = torch.arange(len(rows_I)) - (num_tiles_S.cumsum(0) - num_tiles_S)[rows_I]
    # Later tiles see more keys and threads take neighbours: every second tile first, so that their work is equal.
    order_I = torch.cat((torch.arange(len(rows_I))[::2], torch.arange(len(rows_I))[1::2]))
    return _Cut(
        single_rows_S=singles_S,
        single_tokens_S=batch.query_start_S1[singles_S],
        tile_rows_I=rows_I[order_I].int(),
        tile_starts_I=(tile_I[order_I] * TILE_QUERIES).int(),
    )
