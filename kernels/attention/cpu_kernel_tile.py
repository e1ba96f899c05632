"""`attention` of many queries on a CPU: tiles of queries and keys, multiplied in registers.

Where the CPU multiplies pairs of bf16 (AVX512 BF16) operands are such pairs, else fp32: either way a *word* of four
bytes is what a product reads of a row, and a vector holds a word of sixteen columns. All sums are fp32.

Legend: H query heads, K kv heads, G = H / K, D head dim, W words of D, C columns D is filled up to, R = queries of a
tile times G, J keys of a tile.
"""

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.attention.cpu_kernel import factor_of
from kernels.cpu_jit import device, exp, has_feature, kernel, larger, load, spread, store, typed

# Query tokens of a tile, and keys that are read for it at a time: both fit a core's nearer caches.
TILE_QUERIES = 64
_TILE_KEYS = 128
# Sums in registers: of so many rows, two vectors each.
_ROWS = 8 if has_feature("avx512f") else 2
_COLUMNS = 32
_WORD_BYTES, _LANES = 4, 16


@kernel
def many_queries(
    q_at, tile_rows_at, tile_starts_at, query_start_at, tables_at, seq_lens_at, k_cache_at,
    v_cache_at, k_scale_at, v_scale_at, out_at, num_tiles, table_stride, block_tokens, H, K, D,
    scale, window, soft_cap, tag, kv_tag, index_tag, operand_tag,
):  # fmt: skip
    """Tiles of out [T, H*D]: TILE_QUERIES queries of sequence `tile_rows[i]` from its query `tile_starts[i]` on.

    Online softmax over tiles of keys. `operand_tag`: bf16 or fp32, what is multiplied; the cache's own type, or fp32.
    Source: Dao et al. 2022, "FlashAttention", algorithm 1.
    """
    for task in prange(num_tiles * K):
        _attend_tile(
            np.int64(task // K), np.int64(task % K), typed(q_at, tag), typed(tile_rows_at, index_tag),
            typed(tile_starts_at, index_tag), typed(query_start_at, index_tag),
            typed(tables_at, index_tag), typed(seq_lens_at, index_tag), typed(k_cache_at, kv_tag),
            typed(v_cache_at, kv_tag), k_scale_at != 0, typed(k_scale_at, scale), typed(v_scale_at, scale),
            typed(out_at, tag), table_stride, block_tokens, H, K, D, scale, window, soft_cap, operand_tag,
        )  # fmt: skip


@device
def _attend_tile(
    tile, kv_head, q, tile_rows, tile_starts, query_start, tables, seq_lens, k_cache, v_cache, is_scaled,
    k_scale, v_scale, out, table_stride, block_tokens, H, K, D, scale, window, soft_cap, operand_tag,
):  # fmt: skip
    row, start, G = np.int64(tile_rows[tile]), np.int64(tile_starts[tile]), H // K
    table = row * table_stride
    first_token = np.int64(query_start[row])
    num_queries = np.int64(query_start[row + 1]) - first_token
    position = np.int64(seq_lens[row]) - num_queries + start  # of the tile's first query
    count = min(TILE_QUERIES, num_queries - start)
    R, per_word = count * G, values_per_word(operand_tag)
    filled_R, C = _filled(R, _ROWS), _filled(D, _COLUMNS)
    W, J_words = C // per_word, _TILE_KEYS // per_word
    # One allocation, and addresses into it. Rows and columns that fill up stay 0.
    words_R = W + C + 2
    scratch = np.zeros(filled_R * words_R + _TILE_KEYS * 2 * (W + _ROWS), np.float32)
    q_words = scratch.ctypes.data
    y_words = q_words + _WORD_BYTES * filled_R * W
    highest_words = y_words + _WORD_BYTES * filled_R * C
    key_words = q_words + _WORD_BYTES * filled_R * words_R
    value_words = key_words + _WORD_BYTES * _TILE_KEYS * W
    logit_words = value_words + _WORD_BYTES * _TILE_KEYS * W
    weight_words = logit_words + _WORD_BYTES * _TILE_KEYS * _ROWS
    q_RD, weights_RJ = typed(q_words, operand_tag), typed(weight_words, operand_tag)
    keys, values = typed(key_words, operand_tag), typed(value_words, operand_tag)
    y_RC, logits_RJ, highest_R = (
        typed(y_words, scale), typed(logit_words, scale), typed(highest_words, scale)
    )  # fmt: skip
    total_R = typed(highest_words + _WORD_BYTES * filled_R, scale)
    for r in range(R):
        query = ((first_token + start + r // G) * H + kv_head * G + r % G) * D
        highest_R[r] = np.float32(-np.inf)
        for d in range(D):
            store(q_RD, r * C + d, load(q, query + d))
    first = max(0, position - window + 1) if window > 0 else 0
    for low in range(first, position + count, _TILE_KEYS):
        high = min(low + _TILE_KEYS, position + count)
        for j in range(low, high):
            block = np.int64(tables[table + j // block_tokens])
            cached = (block * K + kv_head) * block_tokens + j % block_tokens
            factor = factor_of(is_scaled, k_scale, cached)
            _place_key(k_cache, cached * D, keys, j - low, D, factor, per_word)
            factor = factor_of(is_scaled, v_scale, cached)
            at = (j - low) // per_word * C * per_word + (j - low) % per_word
            for d in range(D):
                carry(v_cache, cached * D + d, values, at + d * per_word, factor)
        # Nothing is left of an earlier tile, which may be no number.
        for j in range(high - low, _TILE_KEYS):
            at = j // per_word * C * per_word + j % per_word
            for d in range(D):
                store(values, at + d * per_word, np.float32(0))
        for r in range(0, R, _ROWS):
            # What the last of these queries sees of the tile, from the tile's first key.
            seen = min(high, position + min(r + _ROWS - 1, R - 1) // G + 1) - low
            if seen <= 0:
                continue
            for j in range(_ROWS * _TILE_KEYS):
                logits_RJ[j] = 0
            for j in range(0, seen, _COLUMNS):
                add_products(
                    q_words + _WORD_BYTES * r * W, W, key_words + _WORD_BYTES * j, _TILE_KEYS,
                    logit_words + _WORD_BYTES * j, _TILE_KEYS, W, operand_tag,
                )  # fmt: skip
            for i in range(min(_ROWS, R - r)):
                own = position + (r + i) // G
                begin = max(0, own - window + 1 - low) if window > 0 else 0
                end = min(high, own + 1) - low
                peak, shrink, total = _soften(
                    logits_RJ, i * _TILE_KEYS, weights_RJ, i * _TILE_KEYS, begin, end,
                    scale, soft_cap, highest_R[r + i],
                )  # fmt: skip
                highest_R[r + i] = peak
                total_R[r + i] = total_R[r + i] * shrink + total
                for d in range((r + i) * C, (r + i + 1) * C):
                    y_RC[d] *= shrink
            for d in range(0, D, _COLUMNS):
                add_products(
                    weight_words, J_words, value_words + _WORD_BYTES * d, C,
                    y_words + _WORD_BYTES * (r * C + d), C, (seen + per_word - 1) // per_word, operand_tag,
                )  # fmt: skip
    for r in range(R):
        query = ((first_token + start + r // G) * H + kv_head * G + r % G) * D
        inverse = np.float32(1) / total_R[r]
        for d in range(D):
            store(out, query + d, y_RC[r * C + d] * inverse)
    scratch[0] = 0  # its last use: until here it is not freed


@device
def _soften(logits, at, weights, weight, begin, end, scale, soft_cap, peak):
    """Writes e ** (logit - peak), 0 outside of begin to end; gives the row's new peak, how much what was weighed by
    the old one shrinks, and the sum of weights."""
    if begin >= end:
        for j in range(_TILE_KEYS):
            store(weights, weight + j, np.float32(0))
        return peak, np.float32(1), np.float32(0)
    for j in range(_TILE_KEYS):
        logits[at + j] *= scale
    if soft_cap > 0:
        for j in range(_TILE_KEYS):  # tanh y = 1 - 2 / (e ** 2y + 1)
            grown = exp(np.float32(2) * logits[at + j] / soft_cap)
            logits[at + j] = soft_cap * (np.float32(1) - np.float32(2) / (grown + np.float32(1)))
    for j in range(begin):
        logits[at + j] = np.float32(-np.inf)
    for j in range(end, _TILE_KEYS):
        logits[at + j] = np.float32(-np.inf)
    highest = peak
    for j in range(_TILE_KEYS):
        highest = larger(logits[at + j], highest)
    total = np.float32(0)
    for j in range(_TILE_KEYS):
        value = exp(logits[at + j] - highest)
        total += value
        store(weights, weight + j, value)
    return highest, exp(peak - highest), total


@device
def _place_key(cache, first, keys, j, D, factor, per_word):
    """Column j of the tile: a word of it, then the next word of all columns."""
    for d in range(0, D, per_word):
        for i in range(per_word):
            carry(cache, first + d + i, keys, (d * _TILE_KEYS) + j * per_word + i, factor)


@device
def _filled(count, multiple):
    return (count + multiple - 1) // multiple * multiple


@intrinsic
def values_per_word(context, tag):
    """2 of bf16, 1 of fp32."""

    def generate(context, builder, signature, arguments):
        return ir.Constant(ir.IntType(64), 2 if tag == types.uint16 else 1)

    return types.int64(tag), generate


@intrinsic
def carry(context, source, at, target, to, factor):
    """target[to] = source[at] * factor, or, where both are of one type, source[at] as it is."""
    if source == target:

        def generate(context, builder, signature, arguments):
            source_at, at, target_at, to, _ = arguments
            builder.store(builder.load(builder.gep(source_at, [at])), builder.gep(target_at, [to]))
            return context.get_dummy_value()

    else:

        def generate(context, builder, signature, arguments):
            def scaled(source, at, target, to, factor):
                store(target, to, load(source, at) * factor)

            return context.compile_internal(builder, scaled, signature, arguments)

    return types.void(source, types.int64, target, types.int64, types.float32), generate


@intrinsic
def add_products(context, a_at, a_words, b_at, b_words, c_at, c_words, count, tag):
    """c[r, n] += sum over i < count of a[r, i] * b[i, n]: r < _ROWS, n < _COLUMNS, a and b in words of the tag's type.

    A row of each begins so many words after the one before.
    """
    word, long, real = ir.IntType(32), ir.IntType(64), ir.FloatType()
    reals, words = ir.VectorType(real, _LANES), ir.VectorType(word, _LANES)
    is_paired = tag == types.uint16
    operand = words if is_paired else reals

    def generate(context, builder, signature, arguments):
        a_at, a_words, b_at, b_words, c_at, c_words, count, _ = arguments
        name = "llvm.x86.avx512bf16.dpbf16ps.512" if is_paired else "llvm.fma.v16f32"
        form = ir.FunctionType(reals, [reals, operand, operand])
        multiply = builder.module.declare_intrinsic(name, [], form)

        def at(base, words, offset):
            return builder.add(base, builder.mul(words, ir.Constant(long, offset * _WORD_BYTES)))

        def place(kind, address):
            return builder.inttoptr(address, kind.as_pointer())

        halves = [(row, half) for row in range(_ROWS) for half in range(2)]
        one = ir.Constant(long, 1)
        c_places = [
            place(reals, at(at(c_at, c_words, row), one, _LANES * half)) for row, half in halves
        ]
        sums = [cgutils.alloca_once(builder, reals) for _ in halves]
        for kept, c_place in zip(sums, c_places, strict=True):
            builder.store(builder.load(c_place, align=_WORD_BYTES), kept)
        with cgutils.for_range(builder, count) as loop:
            step = builder.mul(loop.index, ir.Constant(long, _WORD_BYTES))
            b_row = builder.add(b_at, builder.mul(step, b_words))
            columns = [
                builder.load(place(operand, at(b_row, one, _LANES * half)), align=_WORD_BYTES)
                for half in range(2)
            ]
            for row in range(_ROWS):
                a_place = place(operand.element, builder.add(at(a_at, a_words, row), step))
                factor = spread(builder, builder.load(a_place, align=_WORD_BYTES), operand)
                for half in range(2):
                    kept = sums[2 * row + half]
                    both = [builder.load(kept), factor, columns[half]]
                    inputs = both if is_paired else [both[1], both[2], both[0]]
                    builder.store(builder.call(multiply, inputs), kept)
        for kept, c_place in zip(sums, c_places, strict=True):
            builder.store(builder.load(kept), c_place, align=_WORD_BYTES)
        return context.get_dummy_value()

    sizes = [types.int64] * 7
    return types.void(*sizes, tag), generate
