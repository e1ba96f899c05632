"""Where a tile of attention lies in q and out, and its result from those of the parts that its keys were cut into."""

import triton
import triton.language as tl


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
def row_places(
    r, query_begin, first_query, num_queries, kv_head,
    BLOCK_Q: tl.constexpr, G: tl.constexpr, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """A tile's rows: the query each belongs to, whether there is one, and where it begins in q and out."""
    query = first_query + r // G
    is_row = (r < BLOCK_Q * G) & (query < num_queries)
    row_at = (query_begin + query).to(tl.int64) * (NUM_HEADS * HEAD_DIM)
    return query, is_row, row_at + (kv_head * G + r % G) * HEAD_DIM


@triton.jit
def combine_and_store(
    out, partial, partial_max, partial_sum, base, num_splits, query_begin, first_query,
    num_queries, kv_head, d,
    BLOCK_Q: tl.constexpr, G: tl.constexpr, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, PART_ROWS: tl.constexpr,
):  # fmt: skip
    """A tile's result from the partial ones of its splits, by the program that finished last."""
    r = tl.arange(0, PART_ROWS)
    _, is_row, row_at = row_places(
        r, query_begin, first_query, num_queries, kv_head, BLOCK_Q, G, NUM_HEADS, HEAD_DIM
    )
    at = out + row_at[:, None] + d[None, :]
    is_out = is_row[:, None] & (d < HEAD_DIM)[None, :]
    # A short sequence has few parts, however many there may be.
    FEW: tl.constexpr = SPLITS // 4 if SPLITS > 4 else SPLITS
    if num_splits <= FEW:
        mean = _combine(
            partial, partial_max, partial_sum, base, num_splits, r, d, BLOCK_D, FEW, PART_ROWS
        )
    else:
        mean = _combine(
            partial, partial_max, partial_sum, base, num_splits, r, d, BLOCK_D, SPLITS, PART_ROWS
        )
    tl.store(at, mean.to(out.dtype.element_ty), mask=is_out)
