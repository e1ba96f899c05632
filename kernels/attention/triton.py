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

from kernels.attention.triton_combine import combine_and_store, row_places

LOG2_E = tl.constexpr(1.4426950408889634)
# Of a key that is not seen: -2^100. Of a power of two the product with any scale is exact, so that a fused
# multiply-add of it and of the maximum that it gave is 0, not what rounding left of 2^100.
NEVER = tl.constexpr(-1.2676506002282294e30)


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
def _whole_tiles(keys, BLOCK_N: tl.constexpr):
    """`keys` rounded up to whole tiles; none below 0."""
    return tl.cdiv(tl.maximum(keys, 0), BLOCK_N) * BLOCK_N


@triton.jit
def _load_tile(cache, at, is_in, other, IS_MASKED: tl.constexpr):
    if IS_MASKED:
        return tl.load(cache + at, mask=is_in, other=other)
    return tl.load(cache + at)


@triton.jit
def _codes(pairs, CODES: tl.constexpr):
    """The two 8-bit codes in each of `pairs`, low byte first, as fp16: "int8", "e4m3", or "e4m3_bits", which is e4m3
    divided by 256 where the hardware does not convert.

    e4m3 has fp16's bits, three mantissa bits and four of the exponent, but for the bias: 7 instead of 15.
    """
    if CODES == "e4m3":
        # By two pairs, of which a register is full: bytes in turn, then a conversion for each output.
        return tl.inline_asm_elementwise(
            """{
                .reg .b32 sorted;
                .reg .b16 even, odd;
                prmt.b32 sorted, $2, 0, 0x3120;
                mov.b32 {even, odd}, sorted;
                cvt.rn.f16x2.e4m3x2 $0, even;
                cvt.rn.f16x2.e4m3x2 $1, odd;
            }""",
            "=r,=r,r",
            [pairs],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    if CODES == "e4m3_bits":
        low = ((pairs << 7) & 0x3F80) | ((pairs << 8) & 0x8000)
        high = ((pairs >> 1) & 0x3F80) | (pairs & 0x8000)
        return low.to(tl.float16, bitcast=True), high.to(tl.float16, bitcast=True)
    # 0x6400 is 1024 and its last bits are ones: an unsigned byte there adds itself.
    low = ((pairs & 0xFF) ^ 0x80) | 0x6400
    high = ((pairs >> 8) ^ 0x80) | 0x6400
    return (
        low.to(tl.float16, bitcast=True) - 1152.0,
        high.to(tl.float16, bitcast=True) - 1152.0,
    )


@triton.jit
def _load_keys(
    k_cache, v_cache, k_scale, v_scale, block, offset, kv_head, d, is_key, k_other, v_other,
    k_scale_other, v_scale_other,
    NUM_KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    IS_PADDED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys and values at `offset` of `block`, and their scales; where there is none, what `..._other` holds.

    In a block the tokens of a head follow each other: [num_blocks, K, BLOCK_TOKENS, WIDTH]. Without `block` keys are
    packed: [tokens, K, WIDTH].
    """
    if block is None:
        at = (offset * NUM_KV_HEADS + kv_head)[:, None] * WIDTH + d[None, :]
    else:
        # What stays the same from tile to tile is added up first, in 32 bits.
        at = (kv_head * BLOCK_TOKENS + offset)[:, None] * WIDTH + d[None, :]
        at = (block * (NUM_KV_HEADS * BLOCK_TOKENS * WIDTH))[:, None] + at
    is_in = is_key[:, None] & (d < WIDTH)[None, :]
    k_tile = _load_tile(k_cache, at, is_in, k_other, IS_PADDED)
    v_tile = _load_tile(v_cache, at, is_in, v_other, IS_PADDED)
    if k_scale is not None:
        scale_at = (block * NUM_KV_HEADS + kv_head) * BLOCK_TOKENS + offset
        k_scale_other = _load_tile(k_scale, scale_at, is_key, k_scale_other, MASKED)
        v_scale_other = _load_tile(v_scale, scale_at, is_key, v_scale_other, MASKED)
    return k_tile, v_tile, k_scale_other, v_scale_other


@triton.jit
def _fold(
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
        k_even, k_odd = _codes(k_tile, CODES)
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
        v_even, v_odd = _codes(v_tile, CODES)
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
            k_tile, v_tile, k_scales, v_scales = _load_keys(
                k_cache + start * KV, v_cache + start * KV, None, None, None, n, kv_head, d, key < end,
                0, 0, 0, 0, NUM_KV_HEADS, WIDTH, BLOCK_TOKENS, IS_PADDED, MASKED,
            )  # fmt: skip
        else:
            block = next_block.to(tl.int64)
            next_block = tl.load(
                block_at + (start + BLOCK_N) // BLOCK_TOKENS, mask=key + BLOCK_N < end, other=0
            )
            k_tile, v_tile, k_scales, v_scales = _load_keys(
                k_cache, v_cache, k_scale, v_scale, block, n % BLOCK_TOKENS, kv_head, d, key < end,
                0, 0, 0, 0, NUM_KV_HEADS, WIDTH, BLOCK_TOKENS, IS_PADDED, MASKED,
            )  # fmt: skip
        acc, acc_odd, m, total, top = _fold(
            acc, acc_odd, m, total, top, q_tile, q_odd, k_tile, v_tile, k_scales, v_scales,
            key, position, end, SCALE, WINDOW, SOFT_CAP, IS_SCALED, CODES, MASKED,
        )  # fmt: skip
    return acc, acc_odd, m, total, top


@triton.jit
def _attend_all(
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
def _window_begin(position, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where the first tile begins that a query at `position` sees keys of."""
    if WINDOW == 0:
        return 0
    return tl.maximum(position - WINDOW + 1, 0) // BLOCK_N * BLOCK_N


@triton.jit
def _joined(acc, acc_odd, top, BLOCK_D: tl.constexpr, CODES: tl.constexpr):
    """What was summed up by even and odd columns of codes, in units of values."""
    joined = tl.reshape(tl.join(acc, acc_odd), (acc.shape[0], BLOCK_D))
    return joined * (top * 256 if CODES == "e4m3_bits" else top)


@triton.jit
def attention(
    q, k_cache, v_cache, k_scale, v_scale, k_new, v_new, block_tables, seq_lens, query_start, out,
    partial, partial_max, partial_sum, counters, num_sequences, table_stride,
    SCALE: tl.constexpr, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_Q: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, MIN_SPLIT: tl.constexpr,
    CODES: tl.constexpr, STAGES: tl.constexpr, TAKES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Without `query_start` tile i is sequence i with one query. A sequence of length 0 is padding.

    TAKES says which sequences are attended to: "all", those with "one" query, or those with "several".

    With scales, fp32 [num_blocks, K, BLOCK_TOKENS], the caches hold pairs of 8-bit codes: e4m3, or integers. `k_new`
    and `v_new`, [T, K * HEAD_DIM], are what the codes of the step's own tokens say: then only earlier tokens are read
    from the caches, in tiles of two stages, as codes are widened into shared memory besides.
    `partial` [tiles * K * SPLITS, PART_ROWS, BLOCK_D] and friends are scratch; `counters` [tiles * K] start at 0 and
    are left at 0.
    """
    G: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    PART_ROWS: tl.constexpr = triton.next_power_of_2(BLOCK_Q * G)
    IS_SCALED: tl.constexpr = k_scale is not None
    # One query of few sequences: the first tile is on its way before the wait (kernels/launch.py).
    IS_EARLY: tl.constexpr = query_start is None and SPLITS > 1
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if not IS_EARLY:
            tl.extra.cuda.gdc_wait()
    if query_start is None or TAKES == "one":
        # One query each waits for memory: heads that lie beside each other in a block are read at the same time.
        kv_head = tl.program_id(0)
        tile = tl.num_programs(1) - 1 - tl.program_id(1)
    else:
        # The last tiles of a prompt have the most keys: they come first.
        tile = tl.num_programs(0) - 1 - tl.program_id(0)
        kv_head = tl.program_id(1)
    split = tl.program_id(2)
    if query_start is None:
        sequence = tile
        query_begin = tile
        num_queries = 1
        first_query = 0
    elif TAKES == "one":
        sequence = tile
        query_begin = tl.load(query_start + sequence)
        num_queries = tl.load(query_start + sequence + 1) - query_begin
        first_query = 0
    else:
        sequence = _sequence_of(tile, query_start, num_sequences, BLOCK_Q)
        query_begin = tl.load(query_start + sequence)
        num_queries = tl.load(query_start + sequence + 1) - query_begin
        first_query = (tile - query_begin // BLOCK_Q - sequence) * BLOCK_Q
    seq_len = tl.load(seq_lens + sequence)
    is_skipped = (first_query >= num_queries) | (seq_len == 0)
    if TAKES == "one":
        is_skipped = is_skipped | (num_queries > 1)
    elif TAKES == "several":
        is_skipped = is_skipped | (num_queries == 1)
    if is_skipped:
        if PDL and IS_EARLY:
            tl.extra.cuda.gdc_wait()
        return
    first_position = seq_len - num_queries

    # Keys [begin, end) are seen by some query of the tile.
    end = tl.minimum(first_position + tl.minimum(first_query + BLOCK_Q, num_queries), seq_len)
    begin = _window_begin(first_position + first_query, WINDOW, BLOCK_N)
    num_splits = 1
    if SPLITS > 1:
        num_splits = tl.minimum(tl.cdiv(end - begin, MIN_SPLIT), SPLITS)
        share = tl.cdiv(tl.cdiv(end - begin, num_splits), BLOCK_N) * BLOCK_N
        num_splits = tl.cdiv(end - begin, share)
        # Without a wait, as the first split waits: its place is free for the next kernel's programs.
        if split >= num_splits:
            return
        begin += split * share
        end = tl.minimum(begin + share, end)
    table = block_tables + sequence.to(tl.int64) * table_stride

    if IS_EARLY:
        # All keys but the newest are of earlier steps.
        n = tl.arange(0, BLOCK_N)
        key = begin + n
        block = tl.load(table + key // BLOCK_TOKENS, mask=key < end, other=0).to(tl.int64)
        WIDTH: tl.constexpr = HEAD_DIM // 2 if IS_SCALED else HEAD_DIM
        pair = tl.arange(0, BLOCK_D // 2 if IS_SCALED else BLOCK_D)
        is_old = (key < end) & (key < first_position)
        k_tile, v_tile, k_scales, v_scales = _load_keys(
            k_cache, v_cache, k_scale, v_scale, block, n % BLOCK_TOKENS, kv_head, pair, is_old,
            0, 0, 0, 0, NUM_KV_HEADS, WIDTH, BLOCK_TOKENS, True, True,
        )  # fmt: skip
        if PDL:
            tl.extra.cuda.gdc_wait()

    r = tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    query, is_row, row_at = row_places(
        r, query_begin, first_query, num_queries, kv_head, BLOCK_Q, G, NUM_HEADS, HEAD_DIM
    )
    position = first_position + query
    is_q = is_row[:, None] & (d < HEAD_DIM)[None, :]
    if k_scale is None:
        q_tile = tl.load(q + row_at[:, None] + d[None, :], mask=is_q, other=0)
        q_odd = 0.0
    else:
        pair = tl.arange(0, BLOCK_D // 2)
        is_pair = is_row[:, None] & (2 * pair < HEAD_DIM)[None, :]
        q_at = q + row_at[:, None] + 2 * pair[None, :]
        q_tile = tl.load(q_at, mask=is_pair, other=0).to(tl.float16)
        q_odd = tl.load(q_at + 1, mask=is_pair, other=0).to(tl.float16)

    m = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, q_tile.shape[1]), tl.float32)
    acc_odd = q_odd if k_scale is None else acc
    top = 1e-30
    if IS_EARLY:
        is_new = (key < end) & (key == first_position)
        k_tile, v_tile, k_scales, v_scales = _load_keys(
            k_cache, v_cache, k_scale, v_scale, block, n % BLOCK_TOKENS, kv_head, pair, is_new,
            k_tile, v_tile, k_scales, v_scales, NUM_KV_HEADS, WIDTH, BLOCK_TOKENS, True, True,
        )  # fmt: skip
        acc, acc_odd, m, total, top = _fold(
            acc, acc_odd, m, total, top, q_tile, q_odd, k_tile, v_tile, k_scales, v_scales,
            key, position, end, SCALE, WINDOW, SOFT_CAP, IS_SCALED, CODES, True,
        )  # fmt: skip
        begin += BLOCK_N
    acc, acc_odd, m, total, top = _attend_all(
        acc, acc_odd, m, total, top, q_tile, q_odd, k_cache, v_cache, k_scale, v_scale,
        table, kv_head, position, first_position + first_query,
        begin, end if k_new is None else first_position,
        SCALE, NUM_KV_HEADS, HEAD_DIM, WINDOW, SOFT_CAP, BLOCK_TOKENS, BLOCK_Q, BLOCK_N, CODES,
        STAGES if k_new is None else 2,
    )  # fmt: skip
    if k_scale is not None:
        acc = _joined(acc, acc_odd, top, BLOCK_D, CODES)
    if k_new is not None:
        new_at = query_begin.to(tl.int64) * (NUM_KV_HEADS * HEAD_DIM)
        q_tile = tl.load(q + row_at[:, None] + d[None, :], mask=is_q, other=0)
        q_odd = 0.0
        acc_odd = q_odd
        acc, _, m, total, _ = _attend_all(
            acc, acc_odd, m, total, top, q_tile, q_odd, k_new + new_at, v_new + new_at, None, None,
            None, kv_head, query, first_query,
            _window_begin(first_query, WINDOW, BLOCK_N), end - first_position,
            SCALE, NUM_KV_HEADS, HEAD_DIM, WINDOW, SOFT_CAP, BLOCK_TOKENS, BLOCK_Q, BLOCK_N, "", STAGES,
        )  # fmt: skip

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
            combine_and_store(
                out, partial, partial_max, partial_sum, base, num_splits, query_begin, first_query,
                num_queries, kv_head, d, BLOCK_Q, G, NUM_HEADS, HEAD_DIM, BLOCK_D, SPLITS, PART_ROWS,
            )  # fmt: skip
            return
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + row_at[:, None] + d[None, :], acc.to(out.dtype.element_ty), mask=is_q)
