"""What else is done to a step's logits: changed before a draw, told after it.

    adjust   masks end tokens, adds biases, applies penalties, in place
    report   how likely the drawn token was, its rank, and the likeliest tokens

    l = l / repetition if l > 0 else l * repetition    for tokens of prompt and output
    l = l - presence - frequency * count               for tokens of the output

Counts are made anew from the token table in each step, so there is nothing that a discarded step could leave behind.
Source: Keskar et al. 2019, "CTRL", section 4.1 (repetition); OpenAI API (presence, frequency).
"""

import triton
import triton.language as tl

from kernels.sampling.triton import float_field, packed_best, token_of, value_of


@triton.jit
def adjust(
    logits, counts, message, tokens, sampling, edits, max_sequences, tokens_stride,
    V: tl.constexpr, BLOCK: tl.constexpr, MAX_ENDS: tl.constexpr, MAX_BIASES: tl.constexpr,
    HEADER_WORDS: tl.constexpr, SAMPLING_WORDS: tl.constexpr,
):  # fmt: skip
    """A program takes a row after the other. `counts` [programs, V] are 0 and are left at 0.

    A token's count is twice how often it was drawn, and 1 more where the prompt has it. Of all places of a token in a
    row, the one that takes the count away changes its logit.
    """
    counts += tl.program_id(0).to(tl.int64) * V
    for s in range(tl.program_id(0), tl.load(message), tl.num_programs(0)):
        entry = message + HEADER_WORDS + s
        if tl.load(entry + 4 * max_sequences) != 0:
            row = tl.load(entry).to(tl.int64)
            params = sampling + row * SAMPLING_WORDS
            edit = edits + row * (MAX_ENDS + 2 * MAX_BIASES)
            scores = logits + tl.cast(s, tl.int64) * V
            end = tl.load(entry + max_sequences) + tl.load(entry + 2 * max_sequences)
            if end < tl.load(params + 12):
                i = tl.arange(0, MAX_ENDS)
                is_end = i < tl.load(params + 13)
                token = tl.load(edit + i, mask=is_end, other=0)
                tl.store(scores + token, float("-inf"), mask=is_end)
                tl.debug_barrier()
            num_biases = tl.load(params + 14)
            if num_biases > 0:
                i = tl.arange(0, MAX_BIASES)
                is_biased = i < num_biases
                token = tl.load(edit + MAX_ENDS + i, mask=is_biased, other=0)
                bias = tl.load(edit + MAX_ENDS + MAX_BIASES + i, mask=is_biased, other=0)
                value = tl.load(scores + token, mask=is_biased, other=0.0)
                value += bias.to(tl.float32, bitcast=True)
                tl.store(scores + token, value, mask=is_biased)
                tl.debug_barrier()
            repetition = float_field(params, 8)
            presence = float_field(params, 9)
            frequency = float_field(params, 10)
            if (repetition != 1.0) | (presence != 0.0) | (frequency != 0.0):
                history = tokens + row * tokens_stride
                num_prompt = tl.load(params + 11)
                for start in range(0, end, BLOCK):
                    i = start + tl.arange(0, BLOCK)
                    token = tl.load(history + i, mask=i < end, other=0)
                    tl.atomic_or(counts + token, 1, mask=i < tl.minimum(num_prompt, end))
                    tl.atomic_add(counts + token, 2, mask=(i >= num_prompt) & (i < end))
                tl.debug_barrier()
                for start in range(0, end, BLOCK):
                    i = start + tl.arange(0, BLOCK)
                    token = tl.load(history + i, mask=i < end, other=0)
                    count = tl.atomic_xchg(counts + token, 0, mask=i < end)
                    takes = (i < end) & (count > 0)
                    value = tl.load(scores + token, mask=takes, other=0.0)
                    value = tl.where(value > 0, value / repetition, value * repetition)
                    drawn = count >> 1
                    value -= frequency * drawn.to(tl.float32) + tl.where(drawn > 0, presence, 0.0)
                    tl.store(scores + token, value, mask=takes)
                tl.debug_barrier()


@triton.jit
def report(
    logits, maxima, sums, ranks, tops, counters, highest, tokens, reports, message, sampling,
    max_sequences, tokens_stride,
    V: tl.constexpr, BLOCK: tl.constexpr, NUM_CHUNKS: tl.constexpr, PARTS: tl.constexpr,
    MAX_TOP: tl.constexpr, TOP_BLOCK: tl.constexpr, REPORT_WORDS: tl.constexpr,
    HEADER_WORDS: tl.constexpr, SAMPLING_WORDS: tl.constexpr,
):  # fmt: skip
    """`reports` [S, REPORT_WORDS]: log probability, rank, likeliest tokens, their log probabilities; fp32 as bits.

    Of the logits as the model gave them. `maxima`, `sums`, `ranks` [S, chunks] and `tops` [S, chunks, TOP_BLOCK] are
    scratch; `counters` [S] start at 0 and are left at 0.
    """
    s = tl.program_id(0)
    entry = message + HEADER_WORDS + s
    if (s >= tl.load(message)) | (tl.load(entry + 4 * max_sequences) == 0):
        return
    row = tl.load(entry).to(tl.int64)
    num_top = tl.load(sampling + row * SAMPLING_WORDS + 15) - 1
    is_drawn = tl.abs(tl.load(highest + s)) < float("inf")  # NaN is not
    if (num_top < 0) | (is_drawn == 0):
        return
    end = tl.load(entry + max_sequences) + tl.load(entry + 2 * max_sequences)
    token = tl.load(tokens + row * tokens_stride + end)
    scores = logits + s.to(tl.int64) * V
    chosen = tl.load(scores + token)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(scores + v, mask=v < V, other=float("-inf"))
    best_of_chunk = tl.max(value, 0)
    at = s.to(tl.int64) * NUM_CHUNKS + tl.program_id(1)
    tl.store(maxima + at, best_of_chunk)
    part = tl.where(value > float("-inf"), tl.exp(value - best_of_chunk), 0.0)
    tl.store(sums + at, tl.sum(part, 0))
    tl.store(ranks + at, tl.sum((value > chosen).to(tl.int32), 0))
    packed = tl.where(v < V, packed_best(value, v), 0)
    for i in range(num_top):
        best = tl.max(packed, 0)
        tl.store(tops + at * TOP_BLOCK + i, best)
        packed = tl.where(packed == best, 0, packed)
    tl.debug_barrier()  # all of this program's stores come before its count
    if tl.atomic_add(counters + s, 1, sem="acq_rel") == NUM_CHUNKS - 1:
        tl.store(counters + s, 0)
        chunk = tl.arange(0, PARTS)
        is_chunk = chunk < NUM_CHUNKS
        first = s.to(tl.int64) * NUM_CHUNKS
        maximum = tl.load(maxima + first + chunk, mask=is_chunk, other=float("-inf"))
        sum_C = tl.load(sums + first + chunk, mask=is_chunk, other=0.0)
        top = tl.max(maximum, 0)
        normalizer = top + tl.log(tl.sum(sum_C * tl.exp(maximum - top), 0))
        rank = 1 + tl.sum(tl.load(ranks + first + chunk, mask=is_chunk, other=0), 0)
        out = reports + s.to(tl.int64) * REPORT_WORDS
        tl.store(out, (chosen - normalizer).to(tl.int32, bitcast=True))
        tl.store(out + 1, rank)
        place = tl.arange(0, TOP_BLOCK)[None, :]
        tops_CN = tl.load(
            tops + (first + chunk[:, None]) * TOP_BLOCK + place,
            mask=is_chunk[:, None] & (place < num_top),
            other=0,
        )
        for i in range(num_top):
            best = tl.max(tl.max(tops_CN, 1), 0)
            tl.store(out + 2 + i, token_of(best))
            logprob = value_of(best) - normalizer
            tl.store(out + 2 + MAX_TOP + i, logprob.to(tl.int32, bitcast=True))
            tops_CN = tl.where(tops_CN == best, 0, tops_CN)
