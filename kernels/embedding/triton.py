"""Rows of the embedding table, one program a token."""

import triton
import triton.language as tl


@triton.jit
def embedding(
    token_ids, weight, scale, out, M: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """out[t] = weight[token_ids[t]], times the row's scale where there is one."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    t = tl.program_id(0).to(tl.int64)
    token = tl.load(token_ids + t).to(tl.int64)
    i = tl.arange(0, BLOCK)
    row = tl.load(weight + token * M + i, mask=i < M, other=0)
    if scale is not None:
        row = row.to(tl.float32) * tl.load(scale + token)
    tl.store(out + t * M + i, row.to(out.dtype.element_ty), mask=i < M)
