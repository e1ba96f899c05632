"""Where a tile of attention lies in q and out, and its result from those of the parts that its keys were cut into."""

import triton
import triton.language as tl


@triton.jit
def _combine(
    partial, partial_max, partial_sum, base, end, num_parts, r, d, is_row,
    BLOCK_D: tl.constexpr, COMBINED: tl.constexpr, PART_ROWS: tl.constexpr,
):  # fmt: skip
    """Softmax-weighted mean of the parts' results at columns `d`, COMBINED parts at a time up to `end`; read past L1,
    other programs wrote them.

    One load each, so that nothing waits in turn.
    """
    p = tl.arange(0, COMBINED)
    top = tl.full((PART_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((PART_ROWS,), tl.float32)
    mean = tl.zeros((PART_ROWS, d.shape[0]), tl.float32)
    for first in range(0, end, COMBINED):
        at = (base + first + p[:, None]) * PART_ROWS + r[None, :]
        is_part = (first + p < num_parts)[:, None]
        if PART_ROWS > 16:  # rows that no query fills are many there
            is_part = is_part & is_row[None, :]
        m = tl.load(partial_max + at, mask=is_part, other=float("-inf"), cache_modifier=".cg")
        sums = tl.load(partial_sum + at, mask=is_part, other=0, cache_modifier=".cg")
        parts = tl.load(
            partial + at[:, :, None] * BLOCK_D + d[None, None, :],
            mask=is_part[:, :, None],
            other=0,
            cache_modifier=".cg",
        )
        new_top = tl.maximum(top, tl.max(m, 0))
        weights = tl.where(m == float("-inf"), 0.0, tl.exp2(m - new_top[None, :]))
        rescale = tl.where(top == float("-inf"), 0.0, tl.exp2(top - new_top))
        total = total * rescale + tl.sum(weights * sums, 0)
        mean = mean * rescale[:, None] + tl.sum(weights[:, :, None] * parts, 0)
        top = new_top
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
    out, partial, partial_max, partial_sum, base, num_parts, query_begin, first_query,
    num_queries, kv_head,
    BLOCK_Q: tl.constexpr, G: tl.constexpr, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr, MOST: tl.constexpr, COMBINED: tl.constexpr,
    PART_ROWS: tl.constexpr,
):  # fmt: skip
    """A tile's result from those of its parts, MOST at most, by the program that finished last; COLUMNS at a time."""
    r = tl.arange(0, PART_ROWS)
    _, is_row, row_at = row_places(
        r, query_begin, first_query, num_queries, kv_head, BLOCK_Q, G, NUM_HEADS, HEAD_DIM
    )
    # A short sequence has few parts, however many there may be.
    FEW: tl.constexpr = COMBINED // 4 if COMBINED > 4 else COMBINED
    # What is combined at once needs no loop.
    ONCE: tl.constexpr = MOST <= COMBINED
    for column in tl.static_range(0, BLOCK_D, COLUMNS):
        d = column + tl.arange(0, COLUMNS)
        if num_parts <= FEW:
            mean = _combine(
                partial, partial_max, partial_sum, base, FEW, num_parts, r, d, is_row,
                BLOCK_D, FEW, PART_ROWS,
            )  # fmt: skip
        else:
            mean = _combine(
                partial, partial_max, partial_sum, base, COMBINED if ONCE else num_parts,
                num_parts, r, d, is_row, BLOCK_D, COMBINED, PART_ROWS,
            )  # fmt: skip
        is_out = is_row[:, None] & (d < HEAD_DIM)[None, :]
        at = out + row_at[:, None] + d[None, :]
        tl.store(at, mean.to(out.dtype.element_ty), mask=is_out)
