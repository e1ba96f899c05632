"""Causal attention of packed query tokens over a paged KV cache: prefill tiles and split decode in one.

A program is (query tile, kv head, split). A tile is BLOCK_Q tokens of one sequence times the G query heads that
share the kv head. Tiles are laid out so that tile i of the grid belongs to the sequence s with
query_start[s] // BLOCK_Q + s <= i: the grid depends on T and S alone. With SPLITS > 1 a tile's keys are cut
into equal parts; the program that finishes last combines the others' partial results.
Source: Kwon et al. 2023 (PagedAttention); Milakov and Gimelshein 2018 (online softmax); Dao et al. 2023
(Flash-Decoding).
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _sequence_of(tile, query_start, num_sequences, BLOCK_Q: tl.constexpr):
    """The last sequence s with query_start[s] // BLOCK_Q + s <= tile."""
    low = 0
    high = num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start + middle) // BLOCK_Q + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _combine(
    partial, partial_max, partial_sum, base, num_splits, r, d,
    BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, PART_ROWS: tl.constexpr,
):  # fmt: skip
    """Softmax-weighted mean of the splits' partial results; read past L1, other programs wrote them.

    One load each, so that nothing waits in turn.
    """
    s = tl.arange(0, SPLITS)
    at = (base + s[:, None]) * PART_ROWS + r[None, :]
    is_part = (s < num_splits)[:, None]
    m = tl.load(partial_max + at, mask=is_part, other=float("-inf"), cache_modifier=".cg")
    sums = tl.load(partial_sum + at, mask=is_part, other=0, cache_modifier=".cg")
    parts = tl.load(
        partial + at[:, :, None] * BLOCK_D + d[None, None, :],
        mask=is_part[:, :, None],
        other=0,
        cache_modifier=".cg",
    )
    top = tl.max(m, 0)
    weights = tl.where(m == float("-inf"), 0.0, tl.exp2(m - top[None, :]))
    total = tl.sum(weights * sums, 0)
    mean = tl.sum(weights[:, :, None] * parts, 0)
    return mean / tl.where(total > 0, total, 1.0)[:, None]


@triton.jit
def _row_places(
    r, query_begin, first_query, num_queries, kv_head,
    BLOCK_Q: tl.constexpr, G: tl.constexpr, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """A tile's rows: the query each belongs to, whether there is one, and where it begins in q and out."""
    query = first_query + r // G
    is_row = (r < BLOCK_Q * G) & (query < num_queries)
    row_at = (query_begin + query).to(tl.int64) * (NUM_HEADS * HEAD_DIM)
    return query, is_row, row_at + (kv_head * G + r % G) * HEAD_DIM


@triton.jit
def _combine_and_store(
    out, partial, partial_max, partial_sum, base, num_splits, query_begin, first_query,
    num_queries, kv_head, d,
    BLOCK_Q: tl.constexpr, G: tl.constexpr, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, PART_ROWS: tl.constexpr,
):  # fmt: skip
    r = tl.arange(0, PART_ROWS)
    _, is_row, row_at = _row_places(
        r, query_begin, first_query, num_queries, kv_head, BLOCK_Q, G, NUM_HEADS, HEAD_DIM
    )
    mean = _combine(
        partial, partial_max, partial_sum, base, num_splits, r, d, BLOCK_D, SPLITS, PART_ROWS
    )
    is_out = is_row[:, None] & (d < HEAD_DIM)[None, :]
    tl.store(out + row_at[:, None] + d[None, :], mean.to(out.dtype.element_ty), mask=is_out)


@triton.jit
def attention(
    q, k_cache, v_cache, block_tables, seq_lens, query_start, out,
    partial, partial_max, partial_sum, counters, num_sequences, table_stride,
    SCALE: tl.constexpr, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_Q: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, MIN_SPLIT: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Without `query_start` tile i is sequence i with one query. A sequence of length 0 is padding.

    `partial` [tiles * K * SPLITS, PART_ROWS, BLOCK_D] and friends are scratch; `counters` [tiles * K] start at 0 and
    are left at 0.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    G: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    PART_ROWS: tl.constexpr = triton.next_power_of_2(BLOCK_Q * G)
    KV: tl.constexpr = NUM_KV_HEADS * HEAD_DIM
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    if query_start is None:
        sequence = tile
        query_begin = tile
        num_queries = 1
        first_query = 0
    else:
        sequence = _sequence_of(tile, query_start, num_sequences, BLOCK_Q)
        query_begin = tl.load(query_start + sequence)
        num_queries = tl.load(query_start + sequence + 1) - query_begin
        first_query = (tile - query_begin // BLOCK_Q - sequence) * BLOCK_Q
    seq_len = tl.load(seq_lens + sequence)
    if (first_query >= num_queries) | (seq_len == 0):
        return
    first_position = seq_len - num_queries

    r = tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    query, is_row, row_at = _row_places(
        r, query_begin, first_query, num_queries, kv_head, BLOCK_Q, G, NUM_HEADS, HEAD_DIM
    )
    position = first_position + query
    is_d = d < HEAD_DIM
    is_q = is_row[:, None] & is_d[None, :]
    q_tile = tl.load(q + row_at[:, None] + d[None, :], mask=is_q, other=0)

    # Keys [begin, end) are seen by some query of the tile.
    end = tl.minimum(first_position + tl.minimum(first_query + BLOCK_Q, num_queries), seq_len)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(first_position + first_query - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    num_splits = 1
    if SPLITS > 1:
        num_splits = tl.minimum(tl.cdiv(end - begin, MIN_SPLIT), SPLITS)
        share = tl.cdiv(tl.cdiv(end - begin, num_splits), BLOCK_N) * BLOCK_N
        num_splits = tl.cdiv(end - begin, share)
        if split >= num_splits:
            return
        begin += split * share
        end = tl.minimum(begin + share, end)

    m = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    table = block_tables + sequence.to(tl.int64) * table_stride
    n = tl.arange(0, BLOCK_N)
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        key = start + n
        is_key = key < end
        block = tl.load(table + key // BLOCK_TOKENS, mask=is_key, other=0).to(tl.int64)
        at = (block * BLOCK_TOKENS + key % BLOCK_TOKENS) * KV + kv_head * HEAD_DIM
        k_tile = tl.load(
            k_cache + at[None, :] + d[:, None], mask=is_key[None, :] & is_d[:, None], other=0
        )
        v_tile = tl.load(
            v_cache + at[:, None] + d[None, :], mask=is_key[:, None] & is_d[None, :], other=0
        )
        scores = tl.dot(q_tile, k_tile.to(q_tile.dtype)) * SCALE
        if SOFT_CAP > 0:
            scores = SOFT_CAP * (2 * tl.sigmoid(2 * scores / SOFT_CAP) - 1)  # cap * tanh(s / cap)
        is_seen = is_key[None, :] & (key[None, :] <= position[:, None])
        if WINDOW > 0:
            is_seen = is_seen & (key[None, :] > position[:, None] - WINDOW)
        scores = tl.where(is_seen, scores * LOG2_E, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, 1))
        # A row that has seen no key yet keeps m = -inf; exp2(-inf - 0) is 0, never nan.
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(scores - m_safe[:, None])
        rescale = tl.exp2(m - m_safe)
        total = total * rescale + tl.sum(p, 1)
        acc = acc * rescale[:, None]
        acc = tl.dot(p.to(q_tile.dtype), v_tile.to(q_tile.dtype), acc)
        m = m_new

    if SPLITS > 1:
        if num_splits > 1:
            tile_at = tile * NUM_KV_HEADS + kv_head
            base = tile_at.to(tl.int64) * SPLITS
            at = (base + split) * PART_ROWS + r
            tl.store(partial_max + at, m, mask=is_row)
            tl.store(partial_sum + at, total, mask=is_row)
            tl.store(partial + at[:, None] * BLOCK_D + d[None, :], acc, mask=is_row[:, None])
            tl.debug_barrier()  # all of this program's stores come before its count
            finished = tl.atomic_add(counters + tile_at, 1, sem="acq_rel")
            if finished < num_splits - 1:
                return
            tl.store(counters + tile_at, 0)
            _combine_and_store(
                out, partial, partial_max, partial_sum, base, num_splits, query_begin, first_query,
                num_queries, kv_head, d, BLOCK_Q, G, NUM_HEADS, HEAD_DIM, BLOCK_D, SPLITS, PART_ROWS,
            )  # fmt: skip
            return
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + row_at[:, None] + d[None, :], acc.to(out.dtype.element_ty), mask=is_q)
