"""Rotates q and k of each token and writes k and v to the KV cache; norms q's and k's heads first where asked.

One program is one token and HEADS heads of qkv. Source: Su et al. 2021, section 3.4.2 (half-rotation form).
"""

import triton
import triton.language as tl


@triton.jit
def qkv_rope_write(
    qkv, positions, rope, slots, q_norm, k_norm, q_out, k_cache, v_cache, k_scale, v_scale,
    k_new, v_new,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    EPS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    LARGEST: tl.constexpr, IS_FP8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`rope` is [positions, cos of HEAD_DIM / 2 then sin]; a slot below 0 is padding, not written.

    BLOCK_D covers HEAD_DIM / 2. With scales, fp32 [num_blocks, K, BLOCK_TOKENS], the caches take 8-bit codes;
    `k_new` and `v_new`, [T, K * HEAD_DIM], take what these say, for whoever reads the step's own tokens.
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
    # Where k's and v's heads are in caches of [num_blocks, K, BLOCK_TOKENS, ...].
    k_at = slot // BLOCK_TOKENS * NUM_KV_HEADS - NUM_HEADS + head
    k_at = k_at * BLOCK_TOKENS + slot % BLOCK_TOKENS
    v_at = k_at - NUM_KV_HEADS * BLOCK_TOKENS
    to_q = is_in & is_q[:, None]
    at = q_out + t * (NUM_HEADS * HEAD_DIM) + head[:, None] * HEAD_DIM + d[None, :]
    tl.store(at, turned_low.to(q_out.dtype.element_ty), mask=to_q)
    tl.store(at + HALF, turned_high.to(q_out.dtype.element_ty), mask=to_q)
    if k_scale is not None:
        scale = tl.maximum(tl.max(tl.abs(turned_low), 1), tl.max(tl.abs(turned_high), 1)) / LARGEST
        # NaN and infinity make the scale NaN or infinite, and so are not lost.
        scale = scale + tl.sum(turned_low * 0, 1) + tl.sum(turned_high * 0, 1)
        turned_low = _codes(turned_low, scale, LARGEST, IS_FP8)
        turned_high = _codes(turned_high, scale, LARGEST, IS_FP8)
        is_k = ~is_q & ~is_v & (slot >= 0)
        is_kept_v = is_v & (head < ALL) & (slot >= 0)
        tl.store(k_scale + k_at, scale, mask=is_k)
        tl.store(v_scale + v_at, scale, mask=is_kept_v)
        if k_new is not None:
            new = t * NUM_KV_HEADS - NUM_HEADS
            low, high = _values(turned_low, scale, IS_FP8), _values(turned_high, scale, IS_FP8)
            at = k_new + (new + head[:, None]) * HEAD_DIM + d[None, :]
            to_k = is_in & ~is_q[:, None] & ~is_v[:, None]
            tl.store(at, low.to(k_new.dtype.element_ty), mask=to_k)
            tl.store(at + HALF, high.to(k_new.dtype.element_ty), mask=to_k)
            at = v_new + (new - NUM_KV_HEADS + head[:, None]) * HEAD_DIM + d[None, :]
            to_v = is_in & is_v[:, None]
            tl.store(at, low.to(v_new.dtype.element_ty), mask=to_v)
            tl.store(at + HALF, high.to(v_new.dtype.element_ty), mask=to_v)
    to_k = is_in & ~is_q[:, None] & ~is_v[:, None] & (slot >= 0)
    at = k_cache + k_at[:, None] * HEAD_DIM + d[None, :]
    tl.store(at, turned_low.to(k_cache.dtype.element_ty), mask=to_k)
    tl.store(at + HALF, turned_high.to(k_cache.dtype.element_ty), mask=to_k)
    to_v = is_in & is_v[:, None] & (slot >= 0)
    at = v_cache + v_at[:, None] * HEAD_DIM + d[None, :]
    tl.store(at, turned_low.to(v_cache.dtype.element_ty), mask=to_v)
    tl.store(at + HALF, turned_high.to(v_cache.dtype.element_ty), mask=to_v)


@triton.jit
def _codes(x, scale, LARGEST: tl.constexpr, IS_FP8: tl.constexpr):
    """x / scale to the nearest code, ties to even, as the byte that is stored."""
    x = x / tl.maximum(scale, 1e-30)[:, None]
    x = tl.where(x == x, tl.minimum(tl.maximum(x, -LARGEST), LARGEST), 0.0)
    if not IS_FP8:
        # Added to 1.5 * 2^23 a number loses its fraction.
        return ((x + 12582912.0) - 12582912.0).to(tl.int32).to(tl.uint8)
    # e4m3 by fp32's own bits: times 2^-120 the exponents agree, subnormal numbers too; 20 mantissa bits go.
    bits = (tl.abs(x) * 7.52316384526264e-37).to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20
    return tl.where(x < 0, bits | 0x80, bits).to(tl.uint8)


@triton.jit
def _values(codes, scale, IS_FP8: tl.constexpr):
    """What the bytes of `_codes` say, fp32."""
    if IS_FP8:
        bits = codes.to(tl.int32)
        magnitude = ((bits & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
        return tl.where(bits >= 0x80, -magnitude, magnitude) * scale[:, None]
    return codes.to(tl.int8, bitcast=True).to(tl.float32) * scale[:, None]


@triton.jit
def _gains(q_norm, k_norm, is_q, is_v, d, is_d):
    q_gain = tl.load(q_norm + d, mask=is_d, other=0).to(tl.float32)[None, :]
    k_gain = tl.load(k_norm + d, mask=is_d, other=0).to(tl.float32)[None, :]
    return tl.where(is_v[:, None], 1.0, tl.where(is_q[:, None], q_gain, k_gain))
