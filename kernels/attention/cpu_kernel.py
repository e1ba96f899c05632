"""`attention` of sequences with one query token each, on a CPU, straight from the cache's blocks.

Legend: S sequences, H query heads, K kv heads, G = H / K, D head dim, J cached tokens that are seen.
"""

import numpy as np
from numba import prange

from kernels.cpu_jit import device, exp, kernel, load, store, typed


@kernel
def one_query(
    q_at, tokens_at, tables_at, rows_at, seq_lens_at, k_cache_at,
    v_cache_at, out_at, S, table_stride, block_tokens, H, K, D,
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
            typed(k_cache_at, kv_tag), typed(v_cache_at, kv_tag), typed(out_at, tag),
            table_stride, block_tokens, H, K, D, scale, window, soft_cap,
        )  # fmt: skip


@device
def _attend(
    s, kv_head, q, tokens, tables, rows, seq_lens, k_cache, v_cache, out,
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
        slot = np.int64(tables[table + block]) * block_tokens - start
        for j in range(max(first, start), min(length, start + block_tokens)):
            _widen(k_cache, ((slot + j) * K + kv_head) * D, row_D, D)
            for g in range(G):
                logits_GJ[g * J + j - first] = _dot(q_GD, g * D, row_D, D)
    for g in range(G):
        if soft_cap > 0:
            _soft_cap(logits_GJ, g * J, J, soft_cap)
        _softmax(logits_GJ, g * J, J)
    for block in range(first // block_tokens, (length - 1) // block_tokens + 1):
        start = block * block_tokens
        slot = np.int64(tables[table + block]) * block_tokens - start
        for j in range(max(first, start), min(length, start + block_tokens)):
            _widen(v_cache, ((slot + j) * K + kv_head) * D, row_D, D)
            for g in range(G):
                _add_scaled(y_GD, g * D, row_D, D, logits_GJ[g * J + j - first])
    for i in range(G * D):
        store(out, query + i, y_GD[i])
    scratch[0] = 0  # its last use: until here it is not freed


@device
def _widen(cache, first, out, D):
    for d in range(D):
        out[d] = load(cache, first + d)


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
