"""`attention` of single queries on a CPU, straight from the cache's blocks.

Legend: S sequences, H query heads, K kv heads, G = H / K, D head dim, J cached tokens that are seen.
"""

import numpy as np
from numba import prange

from kernels.cpu_jit import (
    device,
    element_address,
    elements_per_line,
    exp,
    kernel,
    larger,
    load,
    prefetch,
    store,
    typed,
)


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
    scratch = np.zeros(G * (2 * D + J) + 4 * D, np.float32)
    at = scratch.ctypes.data
    q_GD, y_GD = typed(at, scale), typed(at + 4 * G * D, scale)
    rows_4D, logits_GJ = typed(at + 8 * G * D, scale), typed(at + 8 * (G + 2) * D, scale)
    for i in range(G * D):
        q_GD[i] = load(q, query + i) * scale
    for block in range(first // block_tokens, (length - 1) // block_tokens + 1):
        start = block * block_tokens
        cached = (np.int64(tables[table + block]) * K + kv_head) * block_tokens - start
        if start + block_tokens < length:
            later = (np.int64(tables[table + block + 1]) * K + kv_head) * block_tokens * D
            _ask_for(k_cache, later, min(block_tokens, length - start - block_tokens) * D)
        j, end = max(first, start), min(length, start + block_tokens)
        while j < end:
            count = min(4, end - j)
            for i in range(count):
                factor = factor_of(is_scaled, k_scale, cached + j + i)
                _widen_at(k_cache, (cached + j + i) * D, rows_4D, i * D, D, factor)
            for g in range(G):
                dots = _dots(q_GD, g * D, rows_4D, D)
                for i in range(count):
                    logits_GJ[g * J + j - first + i] = dots[i]
            j += count
    for g in range(G):
        if soft_cap > 0:
            _soft_cap(logits_GJ, g * J, J, soft_cap)
        _softmax(logits_GJ, g * J, J)
    for block in range(first // block_tokens, (length - 1) // block_tokens + 1):
        start = block * block_tokens
        cached = (np.int64(tables[table + block]) * K + kv_head) * block_tokens - start
        if start + block_tokens < length:
            later = (np.int64(tables[table + block + 1]) * K + kv_head) * block_tokens * D
            _ask_for(v_cache, later, min(block_tokens, length - start - block_tokens) * D)
        j, end = max(first, start), min(length, start + block_tokens)
        while j < end:
            count = min(4, end - j)
            for i in range(count):
                factor = factor_of(is_scaled, v_scale, cached + j + i)
                _widen_at(v_cache, (cached + j + i) * D, rows_4D, i * D, D, factor)
            for g in range(G):
                _add_scaled(y_GD, g * D, rows_4D, D, logits_GJ, g * J + j - first, count)
            j += count
    for i in range(G * D):
        store(out, query + i, y_GD[i])
    scratch[0] = 0  # its last use: until here it is not freed


@device
def factor_of(is_scaled, scales, cached):
    """What the codes of one head of one token are multiplied with."""
    return load(scales, cached) if is_scaled else np.float32(1)


@device
def _ask_for(cache, first, count):
    """A head's rows of a block: the caches' own prefetchers know no block tables."""
    for at in range(first, first + count, elements_per_line(cache)):
        prefetch(element_address(cache, at))


@device
def _widen_at(cache, first, out, at, D, factor):
    for d in range(D):
        out[at + d] = load(cache, first + d) * factor


@device
def _dots(a, first, rows, D):
    """Products of a row with four."""
    y0 = y1 = y2 = y3 = np.float32(0)
    for d in range(D):
        value = a[first + d]
        y0 += value * rows[d]
        y1 += value * rows[D + d]
        y2 += value * rows[2 * D + d]
        y3 += value * rows[3 * D + d]
    return y0, y1, y2, y3


@device
def _add_scaled(y, first, rows, D, weights, weight, count):
    """Up to four rows: a sum is read and kept once for all of them."""
    if count == 4:
        w0, w1, w2, w3 = (
            weights[weight],
            weights[weight + 1],
            weights[weight + 2],
            weights[weight + 3],
        )
        for d in range(D):
            y[first + d] += (
                w0 * rows[d] + w1 * rows[D + d] + (w2 * rows[2 * D + d] + w3 * rows[3 * D + d])
            )
    else:
        for i in range(count):
            for d in range(D):
                y[first + d] += weights[weight + i] * rows[i * D + d]


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
        highest = larger(logits[j], highest)
    total = np.float32(0)
    for j in range(first, first + J):
        logits[j] = exp(logits[j] - highest)
        total += logits[j]
    for j in range(first, first + J):
        logits[j] = logits[j] / total
