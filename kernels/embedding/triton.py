"""Rows of the embedding table, one program a token."""

import triton
import triton.language as tl


@triton.jit
def embedding(
    token_ids, weight, scale, gain, out, normed, squares_out,
    M: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[t] = weight[token_ids[t]], times the row's scale where there is one.

    With `gain`, a norm reads the result h: `normed` is h * gain, `squares_out` the sum of h^2.
    """
    if PDL:
        # In this order: what was made before the step's first kernel is then seen by all of its kernels before their
        # own wait, such as sequences' lengths.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    t = tl.program_id(0).to(tl.int64)
    token = tl.load(token_ids + t).to(tl.int64)
    i = tl.arange(0, BLOCK)
    row = tl.load(weight + token * M + i, mask=i < M, other=0)
    if scale is not None:
        row = row.to(tl.float32) * tl.load(scale + token)
    h = row.to(out.dtype.element_ty)
    tl.store(out + t * M + i, h, mask=i < M)
    if gain is not None:
        h = h.to(tl.float32)
        value = h * tl.load(gain + i, mask=i < M, other=0).to(tl.float32)
        tl.store(normed + t * M + i, value.to(normed.dtype.element_ty), mask=i < M)
        tl.store(squares_out + t, tl.sum(h * h, 0))
