"""`attention` on a CPU, straight from the cache's blocks: one kernel for single queries, one for tiles of them.

Legend: S sequences, H query heads, K kv heads, G = H / K, D head dim, J cached tokens that are seen.
"""

import numpy as np
from numba import prange

from kernels.cpu_jit import device, exp, kernel, load, store, typed

# Query tokens of a tile, and keys that are widened for it at a time: both fit a core's first cache.
TILE_QUERIES = 32
_TILE_KEYS = 64


@kernel
def one_query(
    q_at, tokens_at, tables_at, rows_at, seq_lens_at, k_cache_at,
    v_cache_at, k_scale_at, v_scale_at, out_at, S, table_stride, block_tokens, H, K, D,
    scale, window, soft_cap, tag, kv_tag, index_tag,
):  # fmt: skip
    """Row `tokens[s]` of out [T, H*D], from that row of q and the cached keys of sequence `rows[s]`.

    The G query heads of a kv head are computed together: a key is widened once for all of them. `scale` and
    `soft_cap` are fp32.
    """
    for task in prange(S * K):
        _attend(
            np.int64(task // K), np.int64(task % K), typed(q_at, tag), typed(tokens_at, index_tag),
            typed(tables_at, index_tag), typed(rows_at, index_tag), typed(seq_lens_at, index_tag),
            typed(k_cache_at, kv_tag), typed(v_cache_at, kv_tag), k_scale_at != 0, typed(k_scale_at, scale),
            typed(v_scale_at, scale), typed(out_at, tag), table_stride, block_tokens, H, K, D, scale, window, soft_cap,
        )  # fmt: skip


@kernel
def many_queries(
    q_at, tile_rows_at, tile_starts_at, query_start_at, tables_at, seq_lens_at, k_cache_at,
    v_cache_at, k_scale_at, v_scale_at, out_at, num_tiles, table_stride, block_tokens, H, K, D,
    scale, window, soft_cap, tag, kv_tag, index_tag,
):  # fmt: skip
    """Tiles of out [T, H*D]: TILE_QUERIES queries of sequence `tile_rows[i]` from its query `tile_starts[i]` on.

    Online softmax over tiles of keys. Source: Dao et al. 2022, "FlashAttention", algorithm 1.
    """
    for task in prange(num_tiles * K):
        _attend_tile(
            np.int64(task // K), np.int64(task % K), typed(q_at, tag), typed(tile_rows_at, index_tag),
            typed(tile_starts_at, index_tag), typed(query_start_at, index_tag),
            typed(tables_at, index_tag), typed(seq_lens_at, index_tag), typed(k_cache_at, kv_tag),
            typed(v_cache_at, kv_tag), k_scale_at != 0, typed(k_scale_at, scale),
            typed(v_scale_at, scale), typed(out_at, tag), table_stride, block_tokens, H, K, D, scale, window, soft_cap,
        )  # fmt: skip


@device
def _attend(
    s, kv_head, q, tokens, tables, rows, seq_lens, k_cache, v_cache, is_scaled, k_scale, v_scale, out,
    table_stride, block_tokens, H, K, D, scale, window, soft_cap,
):  # fmt: skip
    row, G = np.int64(rows[s]), H // K
    length, table = np.int64(seq_lens[row]), row * table_stride
    first = max(0, length - window) if window > 0 else 0
    J = length - first
    query = (np.int64(tokens[s]) * H + kv_head * G) * D
    # One allocation, and addresses into it: a slice of an array is counted, which costs as much as a dot product.
    scratch = np.zeros(G * (2 * D + J) + D, np.float32)
    at = scratch.ctypes.data
    q_GD, y_GD = typed(at, scale), typed(at + 4 * G * D, scale)
    row_D, logits_GJ = typed(at + 8 * G * D, scale), typed(at + 4 * (2 * G + 1) * D, scale)
    for i in range(G * D):
        q_GD[i] = load(q, query + i) * scale
    for block in range(first // block_tokens, (length - 1) // block_tokens + 1):
        start = block * block_tokens
        cached = (np.int64(tables[table + block]) * K + kv_head) * block_tokens - start
        for j in range(max(first, start), min(length, start + block_tokens)):
            factor = _factor(is_scaled, k_scale, cached + j)
            _widen_at(k_cache, (cached + j) * D, row_D, 0, D, factor)
            for g in range(G):
                logits_GJ[g * J + j - first] = _dot(q_GD, g * D, row_D, D)
    for g in range(G):
        if soft_cap > 0:
            _soft_cap(logits_GJ, g * J, J, soft_cap)
        _softmax(logits_GJ, g * J, J)
    for block in range(first // block_tokens, (length - 1) // block_tokens + 1):
        start = block * block_tokens
        cached = (np.int64(tables[table + block]) * K + kv_head) * block_tokens - start
        for j in range(max(first, start), min(length, start + block_tokens)):
            factor = _factor(is_scaled, v_scale, cached + j)
            _widen_at(v_cache, (cached + j) * D, row_D, 0, D, factor)
            for g in range(G):
                _add_scaled(y_GD, g * D, row_D, D, logits_GJ[g * J + j - first])
    for i in range(G * D):
        store(out, query + i, y_GD[i])
    scratch[0] = 0  # its last use: until here it is not freed


@device
def _attend_tile(
    tile, kv_head, q, tile_rows, tile_starts, query_start, tables, seq_lens, k_cache, v_cache,
    is_scaled, k_scale, v_scale, out, table_stride, block_tokens, H, K, D, scale, window, soft_cap,
):  # fmt: skip
    row, start, G = np.int64(tile_rows[tile]), np.int64(tile_starts[tile]), H // K
    table = row * table_stride
    first_token = np.int64(query_start[row])
    num_queries = np.int64(query_start[row + 1]) - first_token
    position = np.int64(seq_lens[row]) - num_queries + start  # of the tile's first query
    count = min(TILE_QUERIES, num_queries - start)
    R = count * G
    scratch = np.zeros(2 * R * D + 2 * R + _TILE_KEYS * (2 * D + 1), np.float32)
    at = scratch.ctypes.data
    q_RD, y_RD = typed(at, scale), typed(at + 4 * R * D, scale)
    highest_R, total_R = typed(at + 8 * R * D, scale), typed(at + 4 * (2 * D + 1) * R, scale)
    at += 4 * (2 * D + 2) * R
    keys_DJ, values_JD = typed(at, scale), typed(at + 4 * D * _TILE_KEYS, scale)
    logits_J = typed(at + 8 * D * _TILE_KEYS, scale)
    for r in range(R):
        query = ((first_token + start + r // G) * H + kv_head * G + r % G) * D
        highest_R[r] = np.float32(-np.inf)
        for d in range(D):
            q_RD[r * D + d] = load(q, query + d) * scale
    first = max(0, position - window + 1) if window > 0 else 0
    for low in range(first, position + count, _TILE_KEYS):
        high = min(low + _TILE_KEYS, position + count)
        for j in range(low, high):
            block = np.int64(tables[table + j // block_tokens])
            cached = (block * K + kv_head) * block_tokens + j % block_tokens
            factor = _factor(is_scaled, k_scale, cached)
            _widen_apart(k_cache, cached * D, keys_DJ, j - low, _TILE_KEYS, D, factor)
            factor = _factor(is_scaled, v_scale, cached)
            _widen_at(v_cache, cached * D, values_JD, (j - low) * D, D, factor)
        for r in range(R):
            own = position + r // G
            # What this query sees of the tile: [begin, end), from the tile's first key.
            begin = max(0, own - window + 1 - low) if window > 0 else 0
            end = min(high, own + 1) - low
            if begin >= end:
                continue
            for j in range(_TILE_KEYS):
                logits_J[j] = 0
            _add_rows(logits_J, 0, _TILE_KEYS, q_RD, r * D, keys_DJ, 0, D)
            if soft_cap > 0:
                _soft_cap(logits_J, begin, end - begin, soft_cap)
            peak = highest_R[r]
            for j in range(begin, end):
                peak = max(peak, logits_J[j])
            shrink = exp(highest_R[r] - peak)
            total = np.float32(0)
            for j in range(begin, end):
                logits_J[j] = exp(logits_J[j] - peak)
                total += logits_J[j]
            total_R[r] = total_R[r] * shrink + total
            highest_R[r] = peak
            for d in range(D):
                y_RD[r * D + d] *= shrink
            _add_rows(y_RD, r * D, D, logits_J, begin, values_JD, begin * D, end - begin)
    for r in range(R):
        query = ((first_token + start + r // G) * H + kv_head * G + r % G) * D
        for d in range(D):
            store(out, query + d, y_RD[r * D + d] / total_R[r])
    scratch[0] = 0  # its last use: until here it is not freed


@device
def _add_rows(out, at, width, factors, factor, rows, row, count):
    """out[at : at + width] += sum over i < count of factors[factor + i] * rows[row + i * width :][:width]."""
    i = 0
    while i + 8 <= count:  # eight products for each load and store of a sum
        f0, f1, f2, f3 = (
            factors[factor + i], factors[factor + i + 1], factors[factor + i + 2], factors[factor + i + 3]
        )  # fmt: skip
        f4, f5, f6, f7 = (
            factors[factor + i + 4], factors[factor + i + 5], factors[factor + i + 6], factors[factor + i + 7]
        )  # fmt: skip
        x = row + i * width
        for n in range(width):
            low = (
                f0 * rows[x + n] + f1 * rows[x + width + n]
                + f2 * rows[x + 2 * width + n] + f3 * rows[x + 3 * width + n]
            )  # fmt: skip
            high = (
                f4 * rows[x + 4 * width + n] + f5 * rows[x + 5 * width + n]
                + f6 * rows[x + 6 * width + n] + f7 * rows[x + 7 * width + n]
            )  # fmt: skip
            out[at + n] += low + high
        i += 8
    for last in range(i, count):
        f0, x = factors[factor + last], row + last * width
        for n in range(width):
            out[at + n] += f0 * rows[x + n]


@device
def _factor(is_scaled, scales, cached):
    """What the codes of one head of one token are multiplied with."""
    return load(scales, cached) if is_scaled else np.float32(1)


@device
def _widen_at(cache, first, out, at, D, factor):
    for d in range(D):
        out[at + d] = load(cache, first + d) * factor


@device
def _widen_apart(cache, first, out, at, stride, D, factor):
    for d in range(D):
        out[at + d * stride] = load(cache, first + d) * factor


@device
def _dot(a, first, b, D):
    total = np.float32(0)
    for d in range(D):
        total += a[first + d] * b[d]
    return total


@device
def _add_scaled(y, first, v, D, weight):
    for d in range(D):
        y[first + d] += weight * v[d]


@device
def _soft_cap(logits, first, J, cap):
    for j in range(first, first + J):  # tanh y = 1 - 2 / (e ** 2y + 1)
        grown = exp(np.float32(2) * logits[j] / cap)
        logits[j] = cap * (np.float32(1) - np.float32(2) / (grown + np.float32(1)))


@device
def _softmax(logits, first, J):
    """A NaN among them comes back in all."""
    highest = logits[first]
    for j in range(first, first + J):
        highest = max(highest, logits[j])
    total = np.float32(0)
    for j in range(first, first + J):
        logits[j] = exp(logits[j] - highest)
        total += logits[j]
    for j in range(first, first + J):
        logits[j] = logits[j] / total
