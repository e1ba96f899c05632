"""silu(gate) * up of rows that hold gate then up."""

import triton
import triton.language as tl


@triton.jit
def silu_mul(gate_up, out, scale_out, F: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One program a row when `scale_out` is given (then `out` is e4m3), else a block of it."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * 2 * F + i, mask=i < F, other=0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * F + F + i, mask=i < F, other=0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    if scale_out is not None:
        scale = tl.maximum(tl.max(tl.abs(value), 0) / 448.0, 1e-12)
        tl.store(scale_out + row, scale)
        value = value / scale
    tl.store(out + row * F + i, value.to(out.dtype.element_ty), mask=i < F)
