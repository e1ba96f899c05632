"""Causal attention of packed query tokens over a paged KV cache: prefill tiles and decode in one.

A program is a part of a tile's keys, for a kv head. A tile is BLOCK_Q tokens of one sequence times the G query heads
that share the kv head. Tiles are laid out so that tile i belongs to the sequence s with
query_start[s] // BLOCK_Q + s <= i: the grid depends on T and S alone. Beyond the tiles' programs, which take first
parts, EXTRA programs take the further parts that long sequences have (kernels/attention/shares.py); the part that is
finished last combines all of its tile.
Source: Kwon et al. 2023 (PagedAttention); Milakov and Gimelshein 2018 (online softmax); Dao et al. 2023
(Flash-Decoding).
"""

import triton
import triton.language as tl

from kernels.attention.triton_combine import combine_and_store, row_places
from kernels.attention.triton_keys import load_keys
from kernels.attention.triton_softmax import attend_all, fold, joined, window_begin


@triton.jit
def _sequence_of(tile, query_start, num_sequences, BLOCK_Q: tl.constexpr, TAKES: tl.constexpr):
    """The last sequence s with query_start[s] // BLOCK_Q + s <= tile; tile s, where each has one query."""
    if query_start is None or TAKES == "one":
        low = tile
    else:
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
def _owner_of(part, part_start, num_sequences):
    """The sequence that further part `part` of the step belongs to: the last s with part_start[s] <= part."""
    low = 0
    high = num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(part_start + middle) <= part:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def attention(
    q, k_cache, v_cache, k_scale, v_scale, k_new, v_new, block_tables, seq_lens, query_start,
    part_start, out, partial, partial_max, partial_sum, counters, num_sequences, table_stride,
    SCALE: tl.constexpr, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_Q: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, EXTRA: tl.constexpr, MIN_PART: tl.constexpr,
    COMBINED: tl.constexpr, COLUMNS: tl.constexpr, CODES: tl.constexpr, STAGES: tl.constexpr, TAKES: tl.constexpr,
    IS_EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Without `query_start` tile i is sequence i with one query. A sequence of length 0 is padding.

    TAKES says which sequences are attended to: "all", those with "one" query, or those with "several".

    With scales, fp32 [num_blocks, K, BLOCK_TOKENS], the caches hold pairs of 8-bit codes: e4m3, or integers. `k_new`
    and `v_new`, [T, K * HEAD_DIM], are what the codes of the step's own tokens say: then only earlier tokens are read
    from the caches, in tiles of two stages, as codes are widened into shared memory besides.

    With EXTRA the tiles of sequence s have part_start[s] to part_start[s + 1] further parts, each as many; without
    `part_start` there is one sequence with one query, and the EXTRA further parts are its. A part has MIN_PART keys at
    least, so that some may be left over. `partial` [K, 2 * EXTRA, PART_ROWS, BLOCK_D] and friends are scratch;
    `counters` [EXTRA, K] start at 0 and are left at 0. COMBINED parts are combined at a time, COLUMNS of each.

    IS_EARLY: the first tile of keys is on its way before the wait (kernels/launch.py), for steps of few sequences.
    """
    G: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    PART_ROWS: tl.constexpr = triton.next_power_of_2(BLOCK_Q * G)
    IS_SCALED: tl.constexpr = k_scale is not None
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if query_start is None or TAKES == "one":
        # One query each waits for memory: heads that lie beside each other in a block are read at the same time.
        kv_head = tl.program_id(0)
        num_tiles = tl.num_programs(1) - EXTRA
        if part_start is None:
            # Further parts that a short sequence does not have come last.
            tile = tl.program_id(1)
        else:
            tile = tl.num_programs(1) - 1 - tl.program_id(1)
    else:
        # The last tiles of a prompt have the most keys: they come first.
        tile = tl.num_programs(0) - 1 - tl.program_id(0)
        kv_head = tl.program_id(1)
        num_tiles = tl.num_programs(0) - EXTRA
    # Of a further part its number in the step; negative of a tile's first part.
    further = tile - num_tiles
    if part_start is not None:
        # Without a wait, as first parts wait: its place is free for the next kernel's programs.
        if further >= tl.load(part_start + num_sequences, mask=further >= 0, other=0):
            return
    if PDL and not IS_EARLY:
        tl.extra.cuda.gdc_wait()
    if part_start is None:
        if EXTRA > 0:
            sequence = 0
        else:
            sequence = _sequence_of(tile, query_start, num_sequences, BLOCK_Q, TAKES)
    else:
        if further >= 0:
            sequence = _owner_of(further, part_start, num_sequences)
        else:
            sequence = _sequence_of(tile, query_start, num_sequences, BLOCK_Q, TAKES)
    if query_start is None:
        query_begin = sequence
        num_queries = 1
    else:
        query_begin = tl.load(query_start + sequence)
        num_queries = tl.load(query_start + sequence + 1) - query_begin
    if query_start is None or TAKES == "one":
        first_query = 0
    else:
        first_query = (tile - query_begin // BLOCK_Q - sequence) * BLOCK_Q
    # Of this tile: the number of its first further part, how many there are at most, and which part this is.
    first_further = 0
    most_further = EXTRA
    part = tl.maximum(further + 1, 0)
    if part_start is not None:
        own = tl.load(part_start + sequence)
        num_further = tl.load(part_start + sequence + 1) - own
        most_further = num_further // tl.maximum(tl.cdiv(num_queries, BLOCK_Q), 1)
        each = tl.maximum(most_further, 1)
        if further >= 0:
            part = (further - own) % each + 1
            first_query = (further - own) // each * BLOCK_Q
        first_further = own + first_query // BLOCK_Q * most_further
    seq_len = tl.load(seq_lens + sequence)
    is_skipped = (first_query >= num_queries) | (seq_len == 0)
    if part_start is not None:
        is_skipped = is_skipped | (part > most_further)
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
    begin = window_begin(first_position + first_query, WINDOW, BLOCK_N)
    num_parts = 1
    if EXTRA > 0:
        num_parts = tl.minimum(tl.cdiv(end - begin, MIN_PART), most_further + 1)
        share = tl.cdiv(tl.cdiv(end - begin, num_parts), BLOCK_N) * BLOCK_N
        num_parts = tl.cdiv(end - begin, share)
        if part >= num_parts:
            return
        begin += part * share
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
        k_tile, v_tile, k_scales, v_scales = load_keys(
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
        k_tile, v_tile, k_scales, v_scales = load_keys(
            k_cache, v_cache, k_scale, v_scale, block, n % BLOCK_TOKENS, kv_head, pair, is_new,
            k_tile, v_tile, k_scales, v_scales, NUM_KV_HEADS, WIDTH, BLOCK_TOKENS, True, True,
        )  # fmt: skip
        acc, acc_odd, m, total, top = fold(
            acc, acc_odd, m, total, top, q_tile, q_odd, k_tile, v_tile, k_scales, v_scales,
            key, position, end, SCALE, WINDOW, SOFT_CAP, IS_SCALED, CODES, True,
        )  # fmt: skip
        begin += BLOCK_N
    acc, acc_odd, m, total, top = attend_all(
        acc, acc_odd, m, total, top, q_tile, q_odd, k_cache, v_cache, k_scale, v_scale,
        table, kv_head, position, first_position + first_query,
        begin, end if k_new is None else first_position,
        SCALE, NUM_KV_HEADS, HEAD_DIM, WINDOW, SOFT_CAP, BLOCK_TOKENS, BLOCK_Q, BLOCK_N, CODES,
        STAGES if k_new is None else 2,
    )  # fmt: skip
    if k_scale is not None:
        acc = joined(acc, acc_odd, top, BLOCK_D, CODES)
    if k_new is not None:
        new_at = query_begin.to(tl.int64) * (NUM_KV_HEADS * HEAD_DIM)
        q_tile = tl.load(q + row_at[:, None] + d[None, :], mask=is_q, other=0)
        q_odd = 0.0
        acc_odd = q_odd
        acc, _, m, total, _ = attend_all(
            acc, acc_odd, m, total, top, q_tile, q_odd, k_new + new_at, v_new + new_at, None, None,
            None, kv_head, query, first_query,
            window_begin(first_query, WINDOW, BLOCK_N), end - first_position,
            SCALE, NUM_KV_HEADS, HEAD_DIM, WINDOW, SOFT_CAP, BLOCK_TOKENS, BLOCK_Q, BLOCK_N, "", STAGES,
        )  # fmt: skip

    if EXTRA > 0:
        if num_parts > 1:
            base = kv_head.to(tl.int64) * (2 * EXTRA) + 2 * first_further
            at = (base + part) * PART_ROWS + r
            tl.store(partial_max + at, m, mask=is_row)
            tl.store(partial_sum + at, total, mask=is_row)
            tl.store(partial + at[:, None] * BLOCK_D + d[None, :], acc, mask=is_row[:, None])
            tl.debug_barrier()  # all of this program's stores come before its count
            counter = counters + first_further * NUM_KV_HEADS + kv_head
            finished = tl.atomic_add(counter, 1, sem="acq_rel")
            if finished < num_parts - 1:
                return
            tl.store(counter, 0)
            combine_and_store(
                out, partial, partial_max, partial_sum, base, num_parts, query_begin, first_query,
                num_queries, kv_head, BLOCK_Q, G, NUM_HEADS, HEAD_DIM, BLOCK_D, COLUMNS, EXTRA + 1,
                COMBINED, PART_ROWS,
            )  # fmt: skip
            return
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + row_at[:, None] + d[None, :], acc.to(out.dtype.element_ty), mask=is_q)
