"""Draws each row's token on the device and writes it where the next step reads it.

    draw_best        every row's best logit; the tokens of greedy rows
    draw_random      argmax of scores and Gumbel noise, over the whole vocabulary
    greedy_advance   for a loop that only decodes greedily: moves its rows on as well

`kernels/truncation` draws among fewer tokens. The noise is that of `runtime_service/sampling/noise.py`: the same words,
fp32 arithmetic. Rows and their parameters are laid out as `kernels/step_inputs/layout.py` says.
"""

import triton
import triton.language as tl


@triton.jit
def greedy_advance(
    logits, best, counters, token_ids, positions, seq_lens, slots, block_tables, history,
    table_stride, history_stride,
    V: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_TOKENS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Ties go to the lowest token id. `best` [S] u64 and `counters` [S] start at 0 and are left at 0.

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


@triton.jit
def packed_best(value, v):
    """Floats as integers of the same order, above the id's complement: one 64-bit maximum finds both.

    NaN is above all.
    """
    value = tl.where(value == value, value, float("nan"))  # a NaN with a sign would be lowest
    bits = value.to(tl.int32, bitcast=True)
    ordered = tl.where(bits >= 0, bits ^ -2147483648, ~bits).to(tl.uint32, bitcast=True)
    return (ordered.to(tl.uint64) << 32) | (0xFFFFFFFF - v.to(tl.uint64))


@triton.jit
def value_of(packed):
    """The float of a packed maximum."""
    ordered = (packed >> 32).to(tl.uint32).to(tl.int32, bitcast=True)
    bits = tl.where(ordered < 0, ordered ^ -2147483648, ~ordered)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def token_of(packed):
    """The token of a packed maximum."""
    return (0xFFFFFFFF - (packed & 0xFFFFFFFF)).to(tl.int32)


@triton.jit
def _gumbel(word):
    """-log(-log((word + 0.5) / 2^32)), right at both ends.

    Where the uniform u is near 1, fp32 cannot tell it from 1: there -log(u) is a series in 1 - u, which it can hold.
    """
    u = (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    x = ((word ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    series = 0.125 + x * 0.1111111111
    series = 0.1428571429 + x * series
    series = 0.1666666667 + x * series
    series = 0.2 + x * series
    series = 0.25 + x * series
    series = 0.3333333333 + x * series
    series = 0.5 + x * series
    series = x * (1.0 + x * series)
    return -tl.log(tl.where(x < 0.125, series, -tl.log(u)))


@triton.jit
def _words(group, position, sampling):
    """Philox4x32-10 of each group of four tokens."""
    zero = group * 0
    low = tl.load(sampling + 4).to(tl.uint32, bitcast=True)
    high = tl.load(sampling + 5).to(tl.uint32, bitcast=True)
    index = tl.load(sampling + 6).to(tl.uint32, bitcast=True)
    place = position.to(tl.uint32, bitcast=True)
    return tl.philox_impl(group, zero + place, zero + index, zero, zero + low, zero + high)


@triton.jit
def noise(first, position, sampling, BLOCK_V: tl.constexpr):
    """The noise of tokens [first, first + BLOCK_V)."""
    group = (first // 4 + tl.arange(0, BLOCK_V // 4)).to(tl.uint32)
    w0, w1, w2, w3 = _words(group, position, sampling)
    return _gumbel(tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)))


@triton.jit
def noise_of(tokens, position, sampling):
    """The noise of some tokens."""
    w0, w1, w2, w3 = _words((tokens // 4).to(tl.uint32), position, sampling)
    lane = tokens % 4
    return _gumbel(tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3)))


@triton.jit
def float_field(sampling, field: tl.constexpr):
    """One of a row's parameters, held as fp32 bits."""
    return tl.load(sampling + field).to(tl.float32, bitcast=True)


@triton.jit
def draw_best(
    logits, best, counters, highest, drawn, message, tokens, sampling, max_sequences,
    tokens_stride,
    V: tl.constexpr, BLOCK_V: tl.constexpr, MODE: tl.constexpr, HEADER_WORDS: tl.constexpr,
    SAMPLING_WORDS: tl.constexpr,
):  # fmt: skip
    """Keeps each row's best logit in `highest`, and draws its token where the row is greedy (MODE).

    Ties go to the lowest token id. Where the best is not finite `drawn` is -1 and no token is kept. `best` [S] u64 and
    `counters` [S] start at 0 and are left at 0. A program reduces one block of the vocabulary; the last one of a row
    ends it.
    """
    s = tl.program_id(0)
    entry = message + HEADER_WORDS + s
    if (s >= tl.load(message)) | (tl.load(entry + 4 * max_sequences) == 0):
        return
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    value = tl.load(logits + s.to(tl.int64) * V + v, mask=v < V, other=float("-inf"))
    # The count orders both.
    tl.atomic_max(best + s, tl.max(packed_best(value, v), 0), sem="relaxed")
    tl.debug_barrier()
    if tl.atomic_add(counters + s, 1, sem="acq_rel") == tl.num_programs(1) - 1:
        winner = tl.atomic_xchg(best + s, 0, sem="relaxed")
        tl.store(counters + s, 0)
        top = value_of(winner)
        tl.store(highest + s, top)
        row = tl.load(entry).to(tl.int64)
        if tl.abs(top) < float("inf"):  # NaN is not
            if tl.load(sampling + row * SAMPLING_WORDS + 7) == MODE:
                end = tl.load(entry + max_sequences) + tl.load(entry + 2 * max_sequences)
                token = token_of(winner)
                tl.store(drawn + s, token)
                tl.store(tokens + row * tokens_stride + end, token)
        else:
            tl.store(drawn + s, -1)


@triton.jit
def draw_random(
    logits, best, counters, highest, drawn, message, tokens, sampling, max_sequences,
    tokens_stride,
    V: tl.constexpr, BLOCK_V: tl.constexpr, MODE: tl.constexpr, HEADER_WORDS: tl.constexpr,
    SAMPLING_WORDS: tl.constexpr,
):  # fmt: skip
    """Draws a token as argmax((logit - highest) / temperature + noise) for rows of this MODE; as `draw_best` else."""
    s = tl.program_id(0)
    entry = message + HEADER_WORDS + s
    if (s >= tl.load(message)) | (tl.load(entry + 4 * max_sequences) == 0):
        return
    row = tl.load(entry).to(tl.int64)
    params = sampling + row * SAMPLING_WORDS
    top = tl.load(highest + s)
    if tl.load(params + 7) != MODE:
        return
    if tl.abs(top) < float("inf"):
        end = tl.load(entry + max_sequences) + tl.load(entry + 2 * max_sequences)
        first = tl.program_id(1) * BLOCK_V
        v = first + tl.arange(0, BLOCK_V)
        value = tl.load(logits + s.to(tl.int64) * V + v, mask=v < V, other=float("-inf"))
        score = (value - top) / float_field(params, 0) + noise(first, end, params, BLOCK_V)
        tl.atomic_max(best + s, tl.max(packed_best(score, v), 0), sem="acq_rel")
        tl.debug_barrier()
        if tl.atomic_add(counters + s, 1, sem="acq_rel") == tl.num_programs(1) - 1:
            token = token_of(tl.atomic_xchg(best + s, 0, sem="acq_rel"))
            tl.store(counters + s, 0)
            tl.store(drawn + s, token)
            tl.store(tokens + row * tokens_stride + end, token)
