"""RMS norm of each row, with the residual add before it, one program a row.

y = x * rsqrt(mean(x^2) + eps) * weight; with a residual, x is first replaced by x + residual, which is stored.
Source: Zhang and Sennrich 2019.
"""

import triton
import triton.language as tl


@triton.jit
def rms_norm(
    x, residual, weight, out, residual_out, scale_out,
    M: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """With `scale_out`, `out` is e4m3 and the row's scale (amax / 448) is stored there."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    i = tl.arange(0, BLOCK)
    gain = tl.load(weight + i, mask=i < M, other=0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    at = tl.program_id(0).to(tl.int64) * M + i
    value = tl.load(x + at, mask=i < M, other=0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + at, mask=i < M, other=0).to(tl.float32)
        tl.store(residual_out + at, value.to(residual_out.dtype.element_ty), mask=i < M)
    value = value * tl.rsqrt(tl.sum(value * value, 0) / M + EPS) * gain
    if scale_out is not None:
        scale = tl.maximum(tl.max(tl.abs(value), 0) / 448.0, 1e-12)
        tl.store(scale_out + tl.program_id(0), scale)
        value = value / scale
    tl.store(out + at, value.to(out.dtype.element_ty), mask=i < M)
