"""`qkv_rope_write` on a CPU: q and k normed per head and turned, k and v written to the cache, in one call.

Legend: T packed tokens, H query heads, K kv heads, D head dim, half = D / 2.
"""

import numpy as np
from numba import prange

from kernels.cpu_jit import device, kernel, load, of_bits, store, to_bits, typed


@kernel
def turns(positions_at, inv_freq_at, scaling, out_at, T, half, index_tag,
          freq_tag, out_tag):  # fmt: skip
    """cos of each token's angles, then sin, fp32 [T, 2, D/2]; angles are taken in fp64."""
    for t in prange(T):
        positions, inv_freq = typed(positions_at, index_tag), typed(inv_freq_at, freq_tag)
        out = typed(out_at, out_tag)
        for i in range(half):
            angle = np.float64(positions[t]) * inv_freq[i]
            store(out, 2 * t * half + i, np.float32(np.cos(angle) * scaling))
            store(out, (2 * t + 1) * half + i, np.float32(np.sin(angle) * scaling))


@kernel
def rope_write(
    qkv_at, turns_at, slots_at, norm_at, q_at, k_cache_at, v_cache_at,
    T, H, K, D, block_tokens, eps, tag, kv_tag, index_tag, turn_tag,
):  # fmt: skip
    """q [T, H*D] and the caches' rows at `slots`, in blocks [K, block_tokens, D], from qkv [T, (H + 2K) * D].

    `norm_at` holds the q and k weights [2, D] in fp32, or is 0.
    """
    if T == 1:  # waking the other threads costs more
        _rope_write_row(
            typed(qkv_at, tag), typed(turns_at, turn_tag), typed(slots_at, index_tag), norm_at != 0,
            typed(norm_at, turn_tag), typed(q_at, tag), typed(k_cache_at, kv_tag), typed(v_cache_at, kv_tag),
            np.int64(0), H, K, D, block_tokens, eps,
        )  # fmt: skip
        return
    for t in prange(T):
        _rope_write_row(
            typed(qkv_at, tag), typed(turns_at, turn_tag), typed(slots_at, index_tag), norm_at != 0,
            typed(norm_at, turn_tag), typed(q_at, tag), typed(k_cache_at, kv_tag), typed(v_cache_at, kv_tag),
            np.int64(t), H, K, D, block_tokens, eps,
        )  # fmt: skip


@kernel
def write_codes(
    new_at, slots_at, cache_at, scales_at, T, K, D, block_tokens, largest, tag, kv_tag, index_tag,
):  # fmt: skip
    """The cache's rows at `slots`, in blocks [K, block_tokens, D], as codes of new [T, K*D], and their scales: see
    `kernels/kv_cache.py`. `largest` is fp32.
    """
    if T == 1:  # waking the other threads costs more
        _write_codes_row(
            typed(new_at, tag), typed(slots_at, index_tag), typed(cache_at, kv_tag), typed(scales_at, largest),
            np.int64(0), K, D, block_tokens, largest,
        )  # fmt: skip
        return
    for t in prange(T):
        _write_codes_row(
            typed(new_at, tag), typed(slots_at, index_tag), typed(cache_at, kv_tag), typed(scales_at, largest),
            np.int64(t), K, D, block_tokens, largest,
        )  # fmt: skip


@device
def _write_codes_row(new, slots, cache, scales, t, K, D, block_tokens, largest):
    slot = np.int64(slots[t])
    for k in range(K):
        at = ((slot // block_tokens) * K + k) * block_tokens + slot % block_tokens
        first = (t * K + k) * D
        # The bits of magnitudes have their order, and those of NaN come last: it is not lost.
        bits = np.int32(0)
        for d in range(D):
            bits = max(bits, to_bits(load(new, first + d)) & np.int32(0x7FFFFFFF))
        scale = of_bits(bits) / largest
        store(scales, at, scale)
        step = np.float32(1e-30) if scale < np.float32(1e-30) else scale
        for d in range(D):
            code = load(new, first + d) / step
            store(cache, at * D + d, np.float32(0) if code != code else code)


@device
def _rope_write_row(
    qkv, turns, slots, has_norm, norm, q, k_cache, v_cache,
    t, H, K, D, block_tokens, eps,
):  # fmt: skip
    block = np.int64(slots[t]) // block_tokens
    # Where the first head is; each other one is a block's tokens on.
    cached = (block * (K - 1) * block_tokens + np.int64(slots[t])) * D
    qkv_row, turn = t * (H + 2 * K) * D, t * D
    for h in range(H):
        _turn(
            qkv,
            qkv_row + h * D,
            turns,
            turn,
            has_norm,
            norm,
            np.int64(0),
            eps,
            q,
            (t * H + h) * D,
            D,
        )
    for k in range(K):
        first = qkv_row + (H + k) * D
        at = cached + k * block_tokens * D
        _turn(qkv, first, turns, turn, has_norm, norm, D, eps, k_cache, at, D)
        value = qkv_row + (H + K + k) * D
        for d in range(D):
            store(v_cache, at + d, load(qkv, value + d))


@device
def _turn(
    x, first, turns, turn, has_norm, norm, gain, eps, out,
    at, D,
):  # fmt: skip
    """One head: normed, where there is a norm, and turned by the half-rotation."""
    half = D // 2
    if not has_norm:
        for i in range(half):
            low, high = load(x, first + i), load(x, first + half + i)
            cos, sin = load(turns, turn + i), load(turns, turn + half + i)
            store(out, at + i, low * cos - high * sin)
            store(out, at + half + i, high * cos + low * sin)
        return
    squares = np.float32(0)
    for d in range(D):
        squares += load(x, first + d) * load(x, first + d)
    scale = np.float32(1) / np.sqrt(squares / np.float32(D) + np.float32(eps))
    for i in range(half):
        low = load(x, first + i) * scale * load(norm, gain + i)
        high = load(x, first + half + i) * scale * load(norm, gain + half + i)
        cos, sin = load(turns, turn + i), load(turns, turn + half + i)
        store(out, at + i, low * cos - high * sin)
        store(out, at + half + i, high * cos + low * sin)
