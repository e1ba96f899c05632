"""A weight in int8 with a scale for each row, widened for products of many tokens."""

import triton
import triton.language as tl


@triton.jit
def dense_int8(
    weight, scale, out, K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A chunk of a row [K] as values: what torch's product of many tokens reads. out = code * scale, rounded once."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    n = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    codes = tl.load(weight + n * K + k, mask=k < K, other=0)
    values = codes.to(tl.float32) * tl.load(scale + n)
    if PDL:
        tl.extra.cuda.gdc_wait()
    tl.store(out + n * K + k, values.to(out.dtype.element_ty), mask=k < K)
