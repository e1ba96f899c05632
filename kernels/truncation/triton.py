"""Draws among the tokens that top-k, top-p and min-p leave, without a sort: a radix search for the least score.

    narrow   (a launch a digit) the weight of tokens by the next digit of their code; the last program of a row keeps
             the digit at which the weight, from the best token on, reaches its target
    gather   tokens of the last digit found are listed: whether they are kept is not known yet. Those before it are
             kept, and the best of them is found
    finish   one program a row: the exact least score within the list, and the draw

The weight of a token is 1 where top-k is searched (target k), else its exponential (target p times all of it). With
both, all that top-k may keep is listed, and top-p is searched among what it keeps. A code is the token's gap to the
best one, as fp32 bits: the finer the nearer. Ties with the last kept score are kept. Where more tokens are listed than
fit, `finish` reads the row itself.

A row is cut the same way in any batch, and what is summed in no fixed order is an integer: a draw does not depend on
its neighbours. Source: Alabi et al. 2012, "Fast k-selection algorithms for graphics processing units" (bucket select).
"""

import triton
import triton.language as tl

from kernels.sampling.triton import float_field, noise, noise_of, packed_best, token_of

# Codes tell gaps from 0.5 to 128 apart; what is below has the first one, what is above the last.
_FIRST_GAP_BITS: tl.constexpr = tl.constexpr(126 << 23)
_CODE_BITS: tl.constexpr = tl.constexpr(26)
_LAST_CODE: tl.constexpr = tl.constexpr((1 << 26) - 1)
# A token's probability relative to the best one's, as an integer.
_MASS_UNIT: tl.constexpr = tl.constexpr(float(1 << 40))


@triton.jit
def _draws_here(message, entry, params, top, max_sequences, MODE: tl.constexpr):
    """Claims that the row's token is drawn by this kernel; NaN and infinity are not drawn from."""
    is_drawn = (tl.load(entry + 4 * max_sequences) != 0) & (tl.load(params + 7) == MODE)
    return is_drawn & (tl.abs(top) < float("inf"))


@triton.jit
def _is_searched(params):
    """Claims that top-k or top-p may exclude something."""
    return (tl.load(params + 3) > 0) | (float_field(params, 1) < 1.0)


@triton.jit
def _code(value, top, params):
    """How far a token lies below the best one, in [0, 2^26)."""
    # Top-k asks for order alone: its codes do not depend on the temperature.
    scale = tl.where(tl.load(params + 3) > 0, 1.0, 1.0 / float_field(params, 0))
    bits = ((top - value) * scale).to(tl.int32, bitcast=True) - _FIRST_GAP_BITS
    return tl.minimum(tl.maximum(bits, 0), _LAST_CODE)


@triton.jit
def narrow(
    logits, partials, counters, found, weights, highest, message, sampling, max_sequences,
    V: tl.constexpr, CHUNK: tl.constexpr, NUM_CHUNKS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr, DIGIT_BITS: tl.constexpr, SHIFT: tl.constexpr, MODE: tl.constexpr,
    HEADER_WORDS: tl.constexpr, SAMPLING_WORDS: tl.constexpr,
):  # fmt: skip
    """One more digit of `found` [S]. `weights` [S, 2]: of the tokens before it, and of all.

    `partials` [S, chunks, digits] is scratch; `counters` [S] start at 0 and are left at 0.
    """
    s = tl.program_id(0)
    entry = message + HEADER_WORDS + s
    if s >= tl.load(message):
        return
    params = sampling + tl.load(entry).to(tl.int64) * SAMPLING_WORDS
    top = tl.load(highest + s)
    if not (_draws_here(message, entry, params, top, max_sequences, MODE) & _is_searched(params)):
        return
    NUM_DIGITS: tl.constexpr = 1 << DIGIT_BITS
    IS_FIRST: tl.constexpr = SHIFT + DIGIT_BITS == _CODE_BITS
    top_k = tl.load(params + 3)
    coldness = 1.0 / float_field(params, 0)
    if IS_FIRST:
        prefix = tl.zeros((), tl.int32)
        before = tl.zeros((), tl.float32)
    else:
        prefix = tl.load(found + s)
        before = tl.load(weights + 2 * s)
    row = logits + s.to(tl.int64) * V
    first = tl.program_id(1) * CHUNK
    digits = tl.arange(0, NUM_DIGITS)
    weight_DV = tl.zeros((NUM_DIGITS, BLOCK), tl.float32)
    for start in range(first, first + CHUNK, BLOCK):
        v = start + tl.arange(0, BLOCK)
        value = tl.load(row + v, mask=v < V, other=float("-inf"))
        code = _code(value, top, params) >> SHIFT
        is_here = (v < V) & ((code >> DIGIT_BITS) == prefix)
        weight = tl.where(top_k > 0, 1.0, tl.exp((value - top) * coldness))
        digit = tl.where(is_here, code & (NUM_DIGITS - 1), -1)
        weight_DV += tl.where(digit[None, :] == digits[:, None], weight[None, :], 0.0)
    parts = partials + s.to(tl.int64) * NUM_CHUNKS * NUM_DIGITS
    tl.store(parts + tl.program_id(1) * NUM_DIGITS + digits, tl.sum(weight_DV, 1))
    tl.debug_barrier()  # all of this program's stores come before its count
    if tl.atomic_add(counters + s, 1, sem="acq_rel") == NUM_CHUNKS - 1:
        tl.store(counters + s, 0)
        chunk = tl.arange(0, PARTS)[:, None]
        at = parts + chunk * NUM_DIGITS + digits[None, :]
        weight_D = tl.sum(tl.load(at, mask=chunk < NUM_CHUNKS, other=0.0), 0)
        total = tl.sum(weight_D, 0)
        if not IS_FIRST:
            total = tl.load(weights + 2 * s + 1)
        target = tl.where(top_k > 0, top_k.to(tl.float32), float_field(params, 1) * total)
        is_reached = before + tl.cumsum(weight_D, 0) >= target
        last = tl.min(tl.where(is_reached, digits, NUM_DIGITS - 1), 0)
        tl.store(found + s, (prefix << DIGIT_BITS) + last)
        tl.store(weights + 2 * s, before + tl.sum(tl.where(digits < last, weight_D, 0.0), 0))
        tl.store(weights + 2 * s + 1, total)


@triton.jit
def _split(value, top, params, found, SHIFT: tl.constexpr):
    """Scores of a row's tokens; whether top-k and top-p may keep each; whether they keep it for sure."""
    score = (value - top) / float_field(params, 0)
    lists_all = (tl.load(params + 3) > 0) & (float_field(params, 1) < 1.0)
    is_searched = _is_searched(params)
    place = _code(value, top, params) >> SHIFT
    is_open = is_searched & ((place == found) | (lists_all & (place < found)))
    is_sure = (place < found) & (not lists_all) | (not is_searched)
    return score, is_open, is_sure


@triton.jit
def gather(
    logits, best, lengths, listed_tokens, listed_scores, found, highest, message, sampling,
    max_sequences,
    V: tl.constexpr, BLOCK: tl.constexpr, SHIFT: tl.constexpr, CAPACITY: tl.constexpr,
    MODE: tl.constexpr, HEADER_WORDS: tl.constexpr, SAMPLING_WORDS: tl.constexpr,
):  # fmt: skip
    """Lists the open tokens of each row, and keeps the best draw among the sure ones in `best` [S].

    Tokens and scores are listed in [S, CAPACITY] in no order; `lengths` [S] counts those that did not fit too.
    """
    s = tl.program_id(0)
    entry = message + HEADER_WORDS + s
    if s >= tl.load(message):
        return
    params = sampling + tl.load(entry).to(tl.int64) * SAMPLING_WORDS
    top = tl.load(highest + s)
    if not _draws_here(message, entry, params, top, max_sequences, MODE):
        return
    first = tl.program_id(1) * BLOCK
    v = first + tl.arange(0, BLOCK)
    is_token = v < V
    value = tl.load(logits + s.to(tl.int64) * V + v, mask=is_token, other=float("-inf"))
    score, is_open, is_sure = _split(value, top, params, tl.load(found + s), SHIFT)
    is_listed = is_open & is_token
    if tl.max(is_listed.to(tl.int32), 0) > 0:
        # Few are: a place for each costs less than a sum over the block.
        at = tl.atomic_add(lengths + s + v * 0, 1, mask=is_listed)
        fits = is_listed & (at < CAPACITY)
        place = s.to(tl.int64) * CAPACITY + at
        tl.store(listed_tokens + place, v, mask=fits)
        tl.store(listed_scores + place, score, mask=fits)
    is_kept = is_sure & is_token & (score >= float_field(params, 2))
    if tl.max(is_kept.to(tl.int32), 0) > 0:
        end = tl.load(entry + max_sequences) + tl.load(entry + 2 * max_sequences)
        draw = packed_best(score + noise(first, end, params, BLOCK), v)
        tl.atomic_max(best + s, tl.max(tl.where(is_kept, draw, 0), 0))


@triton.jit
def _ordered(score):
    """Scores, none above 0, as integers of the same order in [0, 2^31]."""
    bits = score.to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits.to(tl.int64) + 2147483648, (~bits).to(tl.int64))


@triton.jit
def _open_tokens(
    row, listed_tokens, listed_scores, length, start, top, params, found,
    V: tl.constexpr, BLOCK: tl.constexpr, SHIFT: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """A block of the listed tokens, or of the row where they did not fit: tokens, scores, which of them are open."""
    i = start + tl.arange(0, BLOCK)
    if length <= CAPACITY:
        token = tl.load(listed_tokens + i, mask=i < length, other=0)
        score = tl.load(listed_scores + i, mask=i < length, other=float("-inf"))
        is_open = i < length
    else:
        token = i
        value = tl.load(row + i, mask=i < V, other=float("-inf"))
        score, is_open, _ = _split(value, top, params, found, SHIFT)
        is_open = is_open & (i < V)
    return token, score, is_open


@triton.jit
def _weight_from(
    row, listed_tokens, listed_scores, length, top, params, found, least, by_mass,
    V: tl.constexpr, BLOCK: tl.constexpr, SHIFT: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """What open tokens of at least this ordered score weigh: an integer, the same in any order."""
    weight = tl.zeros((), tl.int64)
    for start in range(0, tl.where(length <= CAPACITY, length, V), BLOCK):
        _, score, is_open = _open_tokens(
            row, listed_tokens, listed_scores, length, start, top, params, found,
            V, BLOCK, SHIFT, CAPACITY,
        )  # fmt: skip
        each = tl.where(by_mass, (tl.exp(score) * _MASS_UNIT).to(tl.int64), 1)
        weight += tl.sum(tl.where(is_open & (_ordered(score) >= least), each, 0), 0)
    return weight


@triton.jit
def _least_score(
    row, listed_tokens, listed_scores, length, top, params, found, least, target, by_mass,
    V: tl.constexpr, BLOCK: tl.constexpr, SHIFT: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """The greatest ordered score, at least `least`, from which on open tokens weigh the target; else `least`."""
    above = tl.full((), 2147483649, tl.int64)
    while above - least > 1:
        middle = (least + above) // 2
        weight = _weight_from(
            row, listed_tokens, listed_scores, length, top, params, found, middle, by_mass,
            V, BLOCK, SHIFT, CAPACITY,
        )  # fmt: skip
        is_reached = weight >= target
        least = tl.where(is_reached, middle, least)
        above = tl.where(is_reached, above, middle)
    return least


@triton.jit
def finish(
    logits, best, lengths, listed_tokens, listed_scores, found, weights, highest, drawn, message,
    tokens, sampling, max_sequences, tokens_stride,
    V: tl.constexpr, BLOCK: tl.constexpr, SHIFT: tl.constexpr, CAPACITY: tl.constexpr,
    MODE: tl.constexpr, HEADER_WORDS: tl.constexpr, SAMPLING_WORDS: tl.constexpr,
):  # fmt: skip
    """Draws each row's token; `best` and `lengths` are left at 0."""
    s = tl.program_id(0)
    entry = message + HEADER_WORDS + s
    if s >= tl.load(message):
        return
    at = tl.load(entry).to(tl.int64)
    params = sampling + at * SAMPLING_WORDS
    top = tl.load(highest + s)
    if not _draws_here(message, entry, params, top, max_sequences, MODE):
        return
    end = tl.load(entry + max_sequences) + tl.load(entry + 2 * max_sequences)
    length = tl.load(lengths + s)
    winner = tl.load(best + s)
    tl.debug_barrier()
    tl.store(lengths + s, 0)
    tl.store(best + s, tl.zeros((), tl.uint64))
    row = logits + s.to(tl.int64) * V
    listed_tokens += s.to(tl.int64) * CAPACITY
    listed_scores += s.to(tl.int64) * CAPACITY
    place = tl.load(found + s)
    top_k = tl.load(params + 3)
    top_p = float_field(params, 1)
    before = tl.load(weights + 2 * s)
    total = tl.load(weights + 2 * s + 1)
    # All listed scores differ only within the last digit: its bounds are where the search begins.
    least = tl.full((), 2147483648, tl.int64)
    for start in range(0, tl.where(length <= CAPACITY, length, V), BLOCK):
        _, score, is_open = _open_tokens(
            row, listed_tokens, listed_scores, length, start, top, params, place,
            V, BLOCK, SHIFT, CAPACITY,
        )  # fmt: skip
        least = tl.minimum(least, tl.min(tl.where(is_open, _ordered(score), 2147483648), 0))
    if top_k > 0:
        missing = top_k - tl.where(top_p < 1.0, 0.0, before).to(tl.int32)
        least = _least_score(
            row, listed_tokens, listed_scores, length, top, params, place, least,
            missing.to(tl.int64), False, V, BLOCK, SHIFT, CAPACITY,
        )  # fmt: skip
        before = tl.zeros((), tl.float32)
        kept = _weight_from(
            row, listed_tokens, listed_scores, length, top, params, place, least, True,
            V, BLOCK, SHIFT, CAPACITY,
        )  # fmt: skip
        total = kept.to(tl.float32) / _MASS_UNIT
    if top_p < 1.0:
        missing_mass = ((top_p * total - before) * _MASS_UNIT).to(tl.int64)
        least = _least_score(
            row, listed_tokens, listed_scores, length, top, params, place, least, missing_mass,
            True, V, BLOCK, SHIFT, CAPACITY,
        )  # fmt: skip
    for start in range(0, tl.where(length <= CAPACITY, length, V), BLOCK):
        token, score, is_open = _open_tokens(
            row, listed_tokens, listed_scores, length, start, top, params, place,
            V, BLOCK, SHIFT, CAPACITY,
        )  # fmt: skip
        is_kept = is_open & (_ordered(score) >= least) & (score >= float_field(params, 2))
        draw = packed_best(score + noise_of(token, end, params), token)
        winner = tl.maximum(winner, tl.max(tl.where(is_kept, draw, 0), 0))
    token = token_of(winner)
    tl.store(drawn + s, token)
    tl.store(tokens + at * tokens_stride + end, token)
