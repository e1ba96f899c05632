"""`rms_norm` on a CPU, with the residual's addition, row by row.

Legend: T packed tokens, M model dim.
"""

import numpy as np
from numba import prange

from kernels.cpu_jit import device, kernel, load, store, typed


@kernel
def rms_norm(x_at, weight_at, out_at, T, M, eps, tag, weight_tag):
    """out = x * rsqrt(mean(x ** 2) + eps) * weight over each row of [T, M]."""
    if T == 1:  # waking the other threads costs more
        _norm_row(
            typed(x_at, tag), typed(weight_at, weight_tag), typed(out_at, tag), np.int64(0), M, eps
        )
        return
    for t in prange(T):
        _norm_row(
            typed(x_at, tag), typed(weight_at, weight_tag), typed(out_at, tag), np.int64(t), M, eps
        )


@kernel
def add_rms_norm(
    x_at, residual_at, weight_at, out_at, total_at, T, M, eps,
    tag, weight_tag,
):  # fmt: skip
    """total = x + residual, as it is kept; out = its norm."""
    if T == 1:
        x, residual, total = typed(x_at, tag), typed(residual_at, tag), typed(total_at, tag)
        _add_row(x, residual, total, np.int64(0), M)
        _norm_row(total, typed(weight_at, weight_tag), typed(out_at, tag), np.int64(0), M, eps)
        return
    for t in prange(T):
        total = typed(total_at, tag)
        _add_row(typed(x_at, tag), typed(residual_at, tag), total, np.int64(t), M)
        _norm_row(total, typed(weight_at, weight_tag), typed(out_at, tag), np.int64(t), M, eps)


@device
def _add_row(x, residual, total, t, M):
    for m in range(t * M, t * M + M):
        store(total, m, load(x, m) + load(residual, m))


@device
def _norm_row(x, weight, out, t, M, eps):
    first = t * M
    squares = np.float32(0)
    for m in range(M):
        squares += load(x, first + m) * load(x, first + m)
    scale = np.float32(1) / np.sqrt(squares / np.float32(M) + np.float32(eps))
    for m in range(M):
        store(out, first + m, load(x, first + m) * scale * load(weight, m))
