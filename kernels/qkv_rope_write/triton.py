"""Rotates q and k of each token and writes k and v to the KV cache; norms q's and k's heads first where asked.

One program is one token and HEADS heads of qkv. Source: Su et al. 2021, section 3.4.2 (half-rotation form).
"""

import triton
import triton.language as tl


@triton.jit
def qkv_rope_write(
    qkv, positions, rope, slots, q_norm, k_norm, q_out, k_cache, v_cache,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    EPS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`rope` is [positions, cos of HEAD_DIM / 2 then sin]; a slot below 0 is padding, not written.

    BLOCK_D covers HEAD_DIM / 2.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    HALF: tl.constexpr = HEAD_DIM // 2
    ALL: tl.constexpr = NUM_HEADS + 2 * NUM_KV_HEADS
    t = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    is_in = (head < ALL)[:, None] & (d < HALF)[None, :]
    at = qkv + t * (ALL * HEAD_DIM) + head[:, None] * HEAD_DIM + d[None, :]
    low = tl.load(at, mask=is_in, other=0).to(tl.float32)
    high = tl.load(at + HALF, mask=is_in, other=0).to(tl.float32)
    is_q = head < NUM_HEADS
    is_v = head >= NUM_HEADS + NUM_KV_HEADS
    if q_norm is not None:
        squares = tl.sum(low * low, 1) + tl.sum(high * high, 1)
        rstd = tl.where(is_v, 1.0, tl.rsqrt(squares / HEAD_DIM + EPS))
        gain_low = _gains(q_norm, k_norm, is_q, is_v, d, d < HALF)
        gain_high = _gains(q_norm, k_norm, is_q, is_v, HALF + d, d < HALF)
        low = low * rstd[:, None] * gain_low
        high = high * rstd[:, None] * gain_high
    angle = rope + tl.load(positions + t).to(tl.int64) * HEAD_DIM + d
    cos = tl.load(angle, mask=d < HALF, other=0)[None, :]
    sin = tl.load(angle + HALF, mask=d < HALF, other=0)[None, :]
    turned_low = tl.where(is_v[:, None], low, low * cos - high * sin)
    turned_high = tl.where(is_v[:, None], high, high * cos + low * sin)

    slot = tl.load(slots + t).to(tl.int64)
    to_q = is_in & is_q[:, None]
    at = q_out + t * (NUM_HEADS * HEAD_DIM) + head[:, None] * HEAD_DIM + d[None, :]
    tl.store(at, turned_low.to(q_out.dtype.element_ty), mask=to_q)
    tl.store(at + HALF, turned_high.to(q_out.dtype.element_ty), mask=to_q)
    row = slot * NUM_KV_HEADS - NUM_HEADS
    to_k = is_in & ~is_q[:, None] & ~is_v[:, None] & (slot >= 0)
    at = k_cache + (row + head[:, None]) * HEAD_DIM + d[None, :]
    tl.store(at, turned_low.to(k_cache.dtype.element_ty), mask=to_k)
    tl.store(at + HALF, turned_high.to(k_cache.dtype.element_ty), mask=to_k)
    to_v = is_in & is_v[:, None] & (slot >= 0)
    at = v_cache + (row - NUM_KV_HEADS + head[:, None]) * HEAD_DIM + d[None, :]
    tl.store(at, turned_low.to(v_cache.dtype.element_ty), mask=to_v)
    tl.store(at + HALF, turned_high.to(v_cache.dtype.element_ty), mask=to_v)


@triton.jit
def _gains(q_norm, k_norm, is_q, is_v, d, is_d):
    q_gain = tl.load(q_norm + d, mask=is_d, other=0).to(tl.float32)[None, :]
    k_gain = tl.load(k_norm + d, mask=is_d, other=0).to(tl.float32)[None, :]
    return tl.where(is_v[:, None], 1.0, tl.where(is_q[:, None], q_gain, k_gain))
