"""`silu_mul` on a CPU. Legend: T packed tokens, F feed-forward dim."""

import numpy as np
from numba import prange

from kernels.cpu_jit import device, exp, kernel, load, store, typed


@kernel
def silu_mul(gate_up_at, out_at, T, F, tag):
    """out[t, f] = silu(gate_up[t, f]) * gate_up[t, F + f]; both dense."""
    if T == 1:  # waking the other threads costs more
        _row(typed(gate_up_at, tag), typed(out_at, tag), np.int64(0), F)
        return
    for t in prange(T):
        _row(typed(gate_up_at, tag), typed(out_at, tag), np.int64(t), F)


@device
def _row(gate_up, out, t, F):
    gate, up, at = t * 2 * F, t * 2 * F + F, t * F
    for f in range(F):
        value = load(gate_up, gate + f)
        gated = value / (np.float32(1) + exp(-value))
        store(out, at + f, gated * load(gate_up, up + f))
