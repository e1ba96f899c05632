"""Tiles of keys and values from a paged cache: as values, or as 8-bit codes that are widened."""

import triton
import triton.language as tl


@triton.jit
def _load_tile(cache, at, is_in, other, IS_MASKED: tl.constexpr):
    if IS_MASKED:
        return tl.load(cache + at, mask=is_in, other=other)
    return tl.load(cache + at)


@triton.jit
def widened(pairs, CODES: tl.constexpr):
    """The two 8-bit codes in each of `pairs`, low byte first, as fp16: "int8", "e4m3", or "e4m3_bits", which is e4m3
    divided by 256 where the hardware does not convert.

    e4m3 has fp16's bits, three mantissa bits and four of the exponent, but for the bias: 7 instead of 15.
    """
    if CODES == "e4m3":
        # By two pairs, of which a register is full: bytes in turn, then a conversion for each output.
        return tl.inline_asm_elementwise(
            """{
                .reg .b32 sorted;
                .reg .b16 even, odd;
                prmt.b32 sorted, $2, 0, 0x3120;
                mov.b32 {even, odd}, sorted;
                cvt.rn.f16x2.e4m3x2 $0, even;
                cvt.rn.f16x2.e4m3x2 $1, odd;
            }""",
            "=r,=r,r",
            [pairs],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    if CODES == "e4m3_bits":
        low = ((pairs << 7) & 0x3F80) | ((pairs << 8) & 0x8000)
        high = ((pairs >> 1) & 0x3F80) | (pairs & 0x8000)
        return low.to(tl.float16, bitcast=True), high.to(tl.float16, bitcast=True)
    # 0x6400 is 1024 and its last bits are ones: an unsigned byte there adds itself.
    low = ((pairs & 0xFF) ^ 0x80) | 0x6400
    high = ((pairs >> 8) ^ 0x80) | 0x6400
    return (
        low.to(tl.float16, bitcast=True) - 1152.0,
        high.to(tl.float16, bitcast=True) - 1152.0,
    )


@triton.jit
def load_keys(
    k_cache, v_cache, k_scale, v_scale, block, offset, kv_head, d, is_key, k_other, v_other,
    k_scale_other, v_scale_other,
    NUM_KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    IS_PADDED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys and values at `offset` of `block`, and their scales; where there is none, what `..._other` holds.

    In a block the tokens of a head follow each other: [num_blocks, K, BLOCK_TOKENS, WIDTH]. Without `block` keys are
    packed: [tokens, K, WIDTH].
    """
    if block is None:
        at = (offset * NUM_KV_HEADS + kv_head)[:, None] * WIDTH + d[None, :]
    else:
        # What stays the same from tile to tile is added up first, in 32 bits.
        at = (kv_head * BLOCK_TOKENS + offset)[:, None] * WIDTH + d[None, :]
        at = (block * (NUM_KV_HEADS * BLOCK_TOKENS * WIDTH))[:, None] + at
    is_in = is_key[:, None] & (d < WIDTH)[None, :]
    k_tile = _load_tile(k_cache, at, is_in, k_other, IS_PADDED)
    v_tile = _load_tile(v_cache, at, is_in, v_other, IS_PADDED)
    if k_scale is not None:
        scale_at = (block * NUM_KV_HEADS + kv_head) * BLOCK_TOKENS + offset
        k_scale_other = _load_tile(k_scale, scale_at, is_key, k_scale_other, MASKED)
        v_scale_other = _load_tile(v_scale, scale_at, is_key, v_scale_other, MASKED)
    return k_tile, v_tile, k_scale_other, v_scale_other
