"""Stored weights widened in registers, to what products multiply."""

import triton
import triton.language as tl


@triton.jit
def as_float(raw, FORMAT: tl.constexpr):
    """Weights as fp32. e4m3 comes as bytes: where the hardware does not convert ("fp8_bits"), sign, exponent
    and mantissa bits are placed in an fp32 and its exponent is rebased."""
    if FORMAT == "plain" or FORMAT == "int8":
        return raw.to(tl.float32)
    if FORMAT == "fp8":
        return raw.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    bits = raw.to(tl.uint32)
    bits = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2 ** 120


@triton.jit
def int4_values(words, groups, PART: tl.constexpr, FORMAT: tl.constexpr):
    """bf16 of nibble PART of each word: (nibble - 8) * scale + zero, rounded once.

    `groups` holds each row's scale in the low and its zero in the high half. By pairs of words: 0x4300 | nibble is
    128 + nibble in bf16, in place of a conversion from integers. fp16 ("int4_any") takes the plain way.
    """
    if FORMAT == "int4_any":
        scale = (groups << 16).to(tl.float32, bitcast=True)
        zero = (groups & -65536).to(tl.float32, bitcast=True)
        levels = ((words.to(tl.int32) >> (4 * PART)) & 15).to(tl.float32) - 8.0
        return (levels * scale[:, None] + zero[:, None]).to(tl.float16)
    scale = groups.to(tl.int16).to(tl.bfloat16, bitcast=True)
    zero = (groups >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return tl.inline_asm_elementwise(
        f"""{{
            .reg .b32 pair, one, low;
            mov.b32 one, 0x3F803F80;
            mov.b32 low, 0xC308C308;
            shr.u32 pair, $1, {4 * PART};
            lop3.b32 pair, pair, 0x000F000F, 0x43004300, 0xEA;
            fma.rn.bf16x2 pair, pair, one, low;
            fma.rn.bf16x2 $0, pair, $2, $3;
        }}""",
        "=r,r,r,r",
        [words, scale[:, None], zero[:, None]],
        dtype=tl.bfloat16,
        is_pure=True,
        pack=2,
    )


@triton.jit
def fp8_values(words, PART: tl.constexpr):
    """bf16 of byte PART of each word, an e4m3: by pairs of words, sign, exponent and mantissa bits are placed in a
    bf16 and its exponent is rebased by 2 ** 120."""
    return tl.inline_asm_elementwise(
        f"""{{
            .reg .b32 bits, sign, rebase, zero;
            mov.b32 rebase, 0x7B807B80;
            mov.b32 zero, 0x80008000;
            {"shl.b32 sign, $1, 8;" if PART == 0 else "mov.b32 sign, $1;"}
            {"shl.b32 bits, $1, 4;" if PART == 0 else "shr.u32 bits, $1, 4;"}
            and.b32 bits, bits, 0x07F007F0;
            lop3.b32 bits, sign, 0x80008000, bits, 0xEA;
            fma.rn.bf16x2 $0, bits, rebase, zero;
        }}""",
        "=r,r",
        [words],
        dtype=tl.bfloat16,
        is_pure=True,
        pack=2,
    )
