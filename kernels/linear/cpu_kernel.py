"""`linear` for few rows on a CPU: a weight's bytes are read once, in order, and widened in registers.

Legend: R rows of x, N out, K in.
"""

import numpy as np
from numba import prange

from kernels.cpu_jit import kernel, load, prefetch, store, typed

# Weight rows of one program, y0 to y3 below. Their bytes follow each other, so that they are one stream.
BLOCK_N = 4
# How far ahead of its reading a weight is asked for, in bytes. The caches' own prefetchers stop at the end of
# a page; measured on Zen 4 at K = 576: 16 GB/s without, 31 at 4 KiB, 34 at 9 KiB.
_AHEAD_BYTES = 9216
_LINE_BYTES = 64


@kernel
def few_rows(
    x_at, weight_at, scale_at, out_at, R, N, K,
    x_tag, weight_tag, scale_tag, weight_bytes,
):  # fmt: skip
    """out[r, n] = scale[n] * sum_k x[r, k] * weight[n, k], summed in fp32.

    `weight_bytes` is the size of a weight's element. N is a multiple of BLOCK_N. All dense.
    """
    x_RK = np.empty((R, K), np.float32)
    x = typed(x_at, x_tag)
    for i in range(R * K):
        x_RK.flat[i] = load(x, i)
    for block in prange(N // 4):
        n = block * 4
        first_at = weight_at + n * K * weight_bytes
        w0 = typed(first_at, weight_tag)
        w1 = typed(first_at + K * weight_bytes, weight_tag)
        w2 = typed(first_at + 2 * K * weight_bytes, weight_tag)
        w3 = typed(first_at + 3 * K * weight_bytes, weight_tag)
        for line in range(0, 4 * K * weight_bytes, _LINE_BYTES):
            prefetch(first_at + line + _AHEAD_BYTES)
        scale = typed(scale_at, scale_tag)
        out = typed(out_at, x_tag)
        for r in range(R):
            row = x_RK[r]
            y0 = y1 = y2 = y3 = np.float32(0)
            for k in range(K):
                value = row[k]
                y0 += value * load(w0, k)
                y1 += value * load(w1, k)
                y2 += value * load(w2, k)
                y3 += value * load(w3, k)
            at = r * N + n
            store(out, at, y0 * load(scale, n))
            store(out, at + 1, y1 * load(scale, n + 1))
            store(out, at + 2, y2 * load(scale, n + 2))
            store(out, at + 3, y3 * load(scale, n + 3))
