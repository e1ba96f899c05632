"""Stored weights widened in registers, to what products multiply."""

import triton
import triton.language as tl


@triton.jit
def as_float(raw, FORMAT: tl.constexpr):
    """Weights as fp32; e4m3 comes as bytes."""
    if FORMAT == "plain" or FORMAT == "int8":
        return raw.to(tl.float32)
    else:  # a `return` behind the `if` would be compiled with it
        return raw.to(tl.float8e4nv, bitcast=True).to(tl.float32)


@triton.jit
def bf16_halves(pairs):
    """The two bf16 of each int32, as fp32."""
    return (pairs << 16).to(tl.float32, bitcast=True), (pairs & -65536).to(tl.float32, bitcast=True)


@triton.jit
def fp16_halves(pairs):
    """The two fp16 of each int32, as fp32; of "int4_any" alone."""
    low = pairs.to(tl.int16).to(tl.float16, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def int4_bf16(words, groups, PART: tl.constexpr):
    """bf16 of nibble PART of each word: (nibble - 8) * scale + zero, rounded once.

    `groups` broadcasts over words and holds a scale in the low and a zero in the high half. By pairs of words:
    0x4300 | nibble is 128 + nibble in bf16, in place of a conversion from integers. Gluon's kernels take it too.
    """
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
        [words, scale, zero],
        dtype=tl.bfloat16,
        is_pure=True,
        pack=2,
    )


@triton.jit
def int4_values(words, groups, PART: tl.constexpr, FORMAT: tl.constexpr):
    """`int4_bf16`, with a group for each row of words.

    "int4_any" is of fp16, which no engine has: its values the plain way, without the assembly that Triton's interpreter
    does not run. Tests take it to interpret all else of these kernels.
    """
    if FORMAT == "int4_any":
        scale, zero = bf16_halves(groups)
        levels = ((words.to(tl.int32) >> (4 * PART)) & 15).to(tl.float32) - 8.0
        return (levels * scale[:, None] + zero[:, None]).to(tl.float16)
    else:  # a `return` behind the `if` would be compiled with it, as another dtype
        return int4_bf16(words, groups[:, None], PART)


@triton.jit
def int4_slots(groups):
    """The last dim of [., ., 4], taken apart."""
    even, odd = tl.split(tl.reshape(groups, (groups.shape[0], groups.shape[1], 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def int4_pairs(words, PART: tl.constexpr):
    """Nibble PART of both halves of int32 words as fp32, plus what `int4_offsets` says.

    A nibble at bit 16 or 12 of an fp32's mantissa, under the exponent of 2 ** 7 or 2 ** 11, is that power plus the
    nibble: in place of a conversion, and most of them lie where few shifts bring them.
    """
    if PART == 0:
        low = (words << 12) & 0xF000 | 0x45000000
        high = words & 0xF0000 | 0x43000000
    elif PART == 1:
        low = (words << 8) & 0xF000 | 0x45000000
        high = (words >> 8) & 0xF000 | 0x45000000
    elif PART == 2:
        low = (words << 8) & 0xF0000 | 0x43000000
        high = (words >> 8) & 0xF0000 | 0x43000000
    else:
        low = words & 0xF000 | 0x45000000
        high = (words >> 12) & 0xF0000 | 0x43000000
    return low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True)


@triton.jit
def int4_offsets(low, high, PART: tl.constexpr):
    """What the offsets of `int4_pairs`, and the 8 of a nibble, add to products with x."""
    OF_LOW: tl.constexpr = 136.0 if PART == 2 else 2056.0
    OF_HIGH: tl.constexpr = 2056.0 if PART == 1 else 136.0
    return low * OF_LOW + high * OF_HIGH
