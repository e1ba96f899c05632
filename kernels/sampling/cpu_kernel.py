"""Draws on a CPU: argmax of scores and Gumbel noise, most of which is only bounded.

The noise is that of `runtime_service/sampling/noise.py`. Few tokens can win, so logarithms are taken for those alone
whose score and a bound of their noise reach the best so far: some twenty of a row.

    u = (word + 0.5) / 2^32,  x = 1 - u;   noise = -log(-log u) <= -log x, as -log(1 - x) >= x
    log2 x >= e + m for x = 2^e (1 + m):   the bits of x as a number, which are near to its logarithm

Legend: R rows, V vocabulary.
"""

import math

import numpy as np
from numba import prange

from kernels.cpu_jit import device, kernel, larger, load, put, to_bits, typed

_BLOCK = 1024
_ROUNDS = 10
_FACTOR_0, _FACTOR_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL_0, _WEYL_1 = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)
_HALF = np.uint64(32)
_LN2_OF_BIT = np.float32(math.log(2) / 2**23)
# The bits of 2^32, and 1e-4 for what fp32 rounds here.
_LARGEST_BOUND = np.float32(math.log(2) * (127 + 32) + 1e-4)


@kernel
def draw_tokens(scores_at, keys_at, drawn_at, R, V, score_tag, key_tag):
    """drawn[r] = argmax over v of scores[r, v] + noise(keys[r], v), the lowest of equals.

    Scores may be -inf. A key is (position, sample index, seed's low half, seed's high half).
    """
    for r in prange(R):
        scores, keys = typed(scores_at, score_tag), typed(keys_at, key_tag)
        position, index = np.uint32(keys[4 * r]), np.uint32(keys[4 * r + 1])
        low, high = np.uint32(keys[4 * r + 2]), np.uint32(keys[4 * r + 3])
        words = np.empty(_BLOCK, np.uint32)
        bounds = np.empty(_BLOCK, np.float32)
        best, winner = np.float32(-np.inf), np.int64(0)
        for first in range(0, V, _BLOCK):
            _words(words, first // 4, position, index, low, high)
            num_tokens = min(V - first, _BLOCK)
            highest = np.float32(-np.inf)
            for i in range(num_tokens):
                bounds[i] = load(scores, r * V + first + i) + _bound(words[i])
                highest = larger(highest, bounds[i])
            if highest < best:
                continue
            for i in range(num_tokens):
                if bounds[i] >= best:
                    score = np.float32(load(scores, r * V + first + i) + _noise(words[i]))
                    if score > best:
                        best, winner = score, first + i
        put(typed(drawn_at, key_tag), r, winner)


@device
def _words(words, first_group, position, index, low, high):
    """Philox4x32-10 of a block's groups of four tokens."""
    for group in range(_BLOCK // 4):
        c0, c1, c2, c3 = np.uint32(first_group + group), position, index, np.uint32(0)
        k0, k1 = low, high
        for _ in range(_ROUNDS):
            p0, p1 = np.uint64(c0) * _FACTOR_0, np.uint64(c2) * _FACTOR_1
            c0, c1, c2, c3 = (
                np.uint32(p1 >> _HALF) ^ c1 ^ k0,
                np.uint32(p1),
                np.uint32(p0 >> _HALF) ^ c3 ^ k1,
                np.uint32(p0),
            )
            k0, k1 = np.uint32(k0 + _WEYL_0), np.uint32(k1 + _WEYL_1)
        words[4 * group], words[4 * group + 1] = c0, c1
        words[4 * group + 2], words[4 * group + 3] = c2, c3


@device
def _bound(word):
    """No less than the word's noise."""
    x = np.float32(~word) + np.float32(0.5)
    return _LARGEST_BOUND - np.float32(to_bits(x)) * _LN2_OF_BIT


@device
def _noise(word):
    """fp64 inside, as there."""
    return np.float32(-math.log(-math.log((np.float64(word) + 0.5) * 2.0**-32)))
