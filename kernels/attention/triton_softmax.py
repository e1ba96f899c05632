"""Online softmax over tiles of keys: attention of one tile of queries over a range of keys.

Source: Milakov and Gimelshein 2018.
"""

import triton
import triton.language as tl

from kernels.attention.triton_keys import load_keys, widened

LOG2_E = tl.constexpr(1.4426950408889634)
# Of a key that is not seen: -2^100. Of a power of two the product with any scale is exact, so that a fused
# multiply-add of it and of the maximum that it gave is 0, not what rounding left of 2^100.
NEVER = tl.constexpr(-1.2676506002282294e30)


@triton.jit
def _whole_tiles(keys, BLOCK_N: tl.constexpr):
    """`keys` rounded up to whole tiles; none below 0."""
    return tl.cdiv(tl.maximum(keys, 0), BLOCK_N) * BLOCK_N


@triton.jit
def fold(
    acc, acc_odd, m, total, top, q_tile, q_odd, k_tile, v_tile, k_scales, v_scales,
    key, position, end,
    SCALE: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, IS_SCALED: tl.constexpr,
    CODES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: a tile of keys and values into the sums.

    A masked score is finite, so that no maximum is ever -inf: what a row that has seen no key yet sums up is wiped
    out by its first one. Of a cache in 8 bits `acc` holds the even columns and `acc_odd` the odd ones, both divided
    by `top`, the largest v_scale so far: p * v_scale / top is at most 1, so that fp16 holds it.
    """
    TO_SCORE: tl.constexpr = SCALE * 256 if CODES == "e4m3_bits" else SCALE
    TO_LOG2: tl.constexpr = TO_SCORE * LOG2_E if SOFT_CAP == 0 else LOG2_E
    if IS_SCALED:
        k_even, k_odd = widened(k_tile, CODES)
        scores = tl.dot(q_tile, tl.trans(k_even))
        scores = tl.dot(q_odd, tl.trans(k_odd), scores)
        scores = scores * k_scales[None, :]
    else:
        scores = tl.dot(q_tile, tl.trans(k_tile))
    if SOFT_CAP > 0:  # cap * tanh(s / cap)
        scores = SOFT_CAP * (2 * tl.sigmoid(scores * (2 * TO_SCORE / SOFT_CAP)) - 1)
    if MASKED:
        is_seen = (key < end)[None, :] & (key[None, :] <= position[:, None])
        if WINDOW > 0:
            is_seen = is_seen & (key[None, :] > position[:, None] - WINDOW)
        scores = tl.where(is_seen, scores, NEVER)
    m_new = tl.maximum(m, tl.max(scores, 1) * TO_LOG2)
    p = tl.exp2(scores * TO_LOG2 - m_new[:, None])
    rescale = tl.exp2(m - m_new)
    total = total * rescale + tl.sum(p, 1)
    if IS_SCALED:
        top_new = tl.maximum(top, tl.max(v_scales, 0))
        inverse = 1 / top_new
        p = (p * (v_scales * inverse)[None, :]).to(tl.float16)
        rescale = rescale * (top * inverse)
        v_even, v_odd = widened(v_tile, CODES)
        acc = tl.dot(p, v_even, acc * rescale[:, None])
        acc_odd = tl.dot(p, v_odd, acc_odd * rescale[:, None])
        top = top_new
    else:
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * rescale[:, None])
    return acc, acc_odd, m_new, total, top


@triton.jit
def _attend(
    acc, acc_odd, m, total, top, q_tile, q_odd, k_cache, v_cache, k_scale, v_scale,
    table, kv_head, position, first, last, end,
    SCALE: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr, CODES: tl.constexpr, STAGES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys of tiles from `first` on, up to `last`; without `table` they follow each other."""
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, q_tile.shape[1])
    IS_SCALED: tl.constexpr = k_scale is not None
    # Elements of a row of the cache: values, or pairs of 8-bit ones.
    WIDTH: tl.constexpr = HEAD_DIM // 2 if IS_SCALED else HEAD_DIM
    IS_PADDED: tl.constexpr = MASKED or q_tile.shape[1] > WIDTH
    KV: tl.constexpr = NUM_KV_HEADS * WIDTH
    if table is not None:
        block_at = table + n // BLOCK_TOKENS
        # A tile ahead, so that no key waits for its block's number.
        next_block = tl.load(block_at + first // BLOCK_TOKENS, mask=first + n < end, other=0)
    for start in tl.range(first, last, BLOCK_N, num_stages=STAGES):
        key = start + n
        if table is None:
            k_tile, v_tile, k_scales, v_scales = load_keys(
                k_cache + start * KV, v_cache + start * KV, None, None, None, n, kv_head, d, key < end,
                0, 0, 0, 0, NUM_KV_HEADS, WIDTH, BLOCK_TOKENS, IS_PADDED, MASKED,
            )  # fmt: skip
        else:
            block = next_block.to(tl.int64)
            next_block = tl.load(
                block_at + (start + BLOCK_N) // BLOCK_TOKENS, mask=key + BLOCK_N < end, other=0
            )
            k_tile, v_tile, k_scales, v_scales = load_keys(
                k_cache, v_cache, k_scale, v_scale, block, n % BLOCK_TOKENS, kv_head, d, key < end,
                0, 0, 0, 0, NUM_KV_HEADS, WIDTH, BLOCK_TOKENS, IS_PADDED, MASKED,
            )  # fmt: skip
        acc, acc_odd, m, total, top = fold(
            acc, acc_odd, m, total, top, q_tile, q_odd, k_tile, v_tile, k_scales, v_scales,
            key, position, end, SCALE, WINDOW, SOFT_CAP, IS_SCALED, CODES, MASKED,
        )  # fmt: skip
    return acc, acc_odd, m, total, top


@triton.jit
def attend_all(
    acc, acc_odd, m, total, top, q_tile, q_odd, k_cache, v_cache, k_scale, v_scale,
    table, kv_head, position, first_row, begin, end,
    SCALE: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, CODES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys [begin, end) by queries at `position`, the first at `first_row`.

    Keys [unmasked, masked) are seen by all of the tile's queries; the others are masked. A single query masks all: it
    waits for memory, and one loop keeps more of it in flight.
    """
    unmasked = begin
    masked = begin
    if BLOCK_Q > 1:
        if WINDOW > 0:
            unmasked += _whole_tiles(first_row + BLOCK_Q - WINDOW - begin, BLOCK_N)
            unmasked = tl.minimum(unmasked, end)
            acc, acc_odd, m, total, top = _attend(
                acc, acc_odd, m, total, top, q_tile, q_odd, k_cache, v_cache, k_scale, v_scale,
                table, kv_head, position, begin, unmasked, end,
                SCALE, NUM_KV_HEADS, HEAD_DIM, WINDOW, SOFT_CAP, BLOCK_TOKENS, BLOCK_N, CODES, STAGES, True,
            )  # fmt: skip
        seen_by_all = tl.maximum(tl.minimum(first_row + 1, end) - unmasked, 0)
        masked = unmasked + seen_by_all // BLOCK_N * BLOCK_N
        acc, acc_odd, m, total, top = _attend(
            acc, acc_odd, m, total, top, q_tile, q_odd, k_cache, v_cache, k_scale, v_scale,
            table, kv_head, position, unmasked, masked, end,
            SCALE, NUM_KV_HEADS, HEAD_DIM, WINDOW, SOFT_CAP, BLOCK_TOKENS, BLOCK_N, CODES, STAGES, False,
        )  # fmt: skip
    return _attend(
        acc, acc_odd, m, total, top, q_tile, q_odd, k_cache, v_cache, k_scale, v_scale,
        table, kv_head, position, masked, end, end,
        SCALE, NUM_KV_HEADS, HEAD_DIM, WINDOW, SOFT_CAP, BLOCK_TOKENS, BLOCK_N, CODES, STAGES, True,
    )  # fmt: skip


@triton.jit
def window_begin(position, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where the first tile begins that a query at `position` sees keys of."""
    if WINDOW == 0:
        return 0
    return tl.maximum(position - WINDOW + 1, 0) // BLOCK_N * BLOCK_N


@triton.jit
def joined(acc, acc_odd, top, BLOCK_D: tl.constexpr, CODES: tl.constexpr):
    """What was summed up by even and odd columns of codes, in units of values."""
    joined = tl.reshape(tl.join(acc, acc_odd), (acc.shape[0], BLOCK_D))
    return joined * (top * 256 if CODES == "e4m3_bits" else top)
