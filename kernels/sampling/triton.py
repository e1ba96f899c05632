"""Draws the likeliest token of each row and moves the row on by one position, all on the device.

A program reduces one block of the vocabulary; the last one to finish a row writes its token, and the row's
next position, length and KV slot, so that the next decode step needs nothing from the host.
"""

import triton
import triton.language as tl


@triton.jit
def greedy_advance(
    logits, best, counters, token_ids, positions, seq_lens, slots, block_tables, history,
    table_stride, history_stride,
    V: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_TOKENS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Ties go to the lowest token id. `best` [S] i64 and `counters` [S] start at 0 and are left at 0.

    `history` [S, history_stride] keeps the token at its position. A row with seq_len 0 is padding.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    s = tl.program_id(0)
    seq_len = tl.load(seq_lens + s)
    if seq_len == 0:
        return
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    value = tl.load(logits + s.to(tl.int64) * V + v, mask=v < V, other=float("-inf")).to(tl.float32)
    # Floats as integers of the same order, above the id's complement: one 64-bit maximum finds both.
    bits = value.to(tl.int32, bitcast=True)
    ordered = tl.where(bits >= 0, bits ^ -2147483648, ~bits).to(tl.uint32, bitcast=True)
    packed = (ordered.to(tl.uint64) << 32) | (0xFFFFFFFF - v.to(tl.uint64))
    winner = tl.max(packed, 0)
    tl.atomic_max(best + s, winner, sem="acq_rel")
    tl.debug_barrier()
    if tl.atomic_add(counters + s, 1, sem="acq_rel") == tl.num_programs(1) - 1:
        winner = tl.atomic_xchg(best + s, 0, sem="acq_rel")
        token = (0xFFFFFFFF - (winner & 0xFFFFFFFF)).to(tl.int32)
        tl.store(counters + s, 0)
        position = tl.load(positions + s) + 1
        tl.store(history + s.to(tl.int64) * history_stride + position, token)
        tl.store(token_ids + s, token)
        tl.store(positions + s, position)
        tl.store(seq_lens + s, seq_len + 1)
        block = tl.load(block_tables + s.to(tl.int64) * table_stride + position // BLOCK_TOKENS)
        tl.store(slots + s, block * BLOCK_TOKENS + position % BLOCK_TOKENS)
