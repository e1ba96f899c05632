"""`linear` for few rows on a CPU: a weight's bytes are read once, in order, and widened in registers, or
multiplied as they are where the CPU multiplies bytes.

Legend: R rows of x, N out, K in.
"""

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.cpu_jit import device, kernel, load, prefetch, store, typed

# Weight rows of one program, y0 to y3 below. Their bytes follow each other, so that they are one stream.
BLOCK_N = 4
# How far ahead of its reading a weight is asked for, in bytes. The caches' own prefetchers stop at the end of
# a page; measured on Zen 4 at K = 576: 16 GB/s without, 31 at 4 KiB, 34 at 9 KiB.
_AHEAD_BYTES = 9216
_LINE_BYTES = 64
# Bytes of a vector of the widest registers; K is a multiple of it where bytes are multiplied.
VECTOR_BYTES = 64


@kernel
def few_rows(
    x_at, weight_at, scale_at, bias_at, out_at, R, N, K,
    x_tag, weight_tag, scale_tag, weight_bytes,
):  # fmt: skip
    """out[r, n] = scale[n] * sum_k x[r, k] * weight[n, k] + bias[n], summed in fp32.

    `weight_bytes` is the size of a weight's element; `bias_at` is 0 where there is none. N is a multiple of BLOCK_N.
    All dense.
    """
    x_RK = np.empty((R, K), np.float32)
    x = typed(x_at, x_tag)
    for i in range(R * K):
        x_RK.flat[i] = load(x, i)
    for block in prange(N // 4):
        n = block * 4
        first_at = weight_at + n * K * weight_bytes
        w0 = typed(first_at, weight_tag)
        w1 = typed(first_at + K * weight_bytes, weight_tag)
        w2 = typed(first_at + 2 * K * weight_bytes, weight_tag)
        w3 = typed(first_at + 3 * K * weight_bytes, weight_tag)
        for line in range(0, 4 * K * weight_bytes, _LINE_BYTES):
            prefetch(first_at + line + _AHEAD_BYTES)
        scale, bias = typed(scale_at, scale_tag), typed(bias_at, scale_tag)
        out = typed(out_at, x_tag)
        for r in range(R):
            row = x_RK[r]
            y0 = y1 = y2 = y3 = np.float32(0)
            for k in range(K):
                value = row[k]
                y0 += value * load(w0, k)
                y1 += value * load(w1, k)
                y2 += value * load(w2, k)
                y3 += value * load(w3, k)
            sums = y0, y1, y2, y3
            for i in range(4):
                y = sums[i] * load(scale, n + i)
                store(out, r * N + n + i, y + load(bias, n + i) if bias_at else y)


@kernel
def few_rows_of_nibbles(
    x_at, weight_at, scale_at, zero_at, bias_at, out_at, R, N, K, G, x_tag, scale_tag, bias_tag
):
    """As `few_rows`, of weights (nibble - 8) * scale + zero in groups of G along K, by products of bytes.

        x[r, k] = step[r] * (256 * high[r, k] + low[r, k]),  step[r] = max over k of |x[r, k]| / (127 * 257)

    Here both bytes of x have a sign, as nibbles have none. weight: uint8 [N / 4, K / 64, 2, 64], a byte of which is
    a value of row 4 n + 2 i in its low and of row 4 n + 2 i + 1 in its high half. scale, zero: bf16 [N, K / G], and
    16 values more that are not read, or read in vain. G is a multiple of VECTOR_BYTES, N of BLOCK_N.
    """
    J = K // G
    bytes_2RK, steps_R = np.empty((2, R, K), np.uint8), np.empty(R, np.float32)
    # Of a group's codes: -8 times their sum in the first lane of a vector, and all sums of a row side by side.
    shifts_RJL = np.zeros((R, J, 16), np.int32)
    sums_RJ = np.zeros((R, J + 16), np.float32)
    x = typed(x_at, x_tag)
    for r in range(R):
        high, low = bytes_2RK[0, r], bytes_2RK[1, r]
        steps_R[r] = _split(x, r * K, high, low, K, True)
        for j in range(J):
            total = np.int32(0)
            for k in range(j * G, j * G + G):
                total += (np.int32(np.int8(high[k])) << 8) + np.int32(np.int8(low[k]))
            shifts_RJL[r, j, 0] = -8 * total
            sums_RJ[r, j] = total
    for block in prange(N // 4):
        n = block * 4
        first_at = weight_at + block * 2 * K
        for line in range(0, 2 * K, _LINE_BYTES):
            prefetch(first_at + line + _AHEAD_BYTES)
        scale, zero = typed(scale_at, scale_tag), typed(zero_at, scale_tag)
        bias, out = typed(bias_at, bias_tag), typed(out_at, x_tag)
        high_at = bytes_2RK.ctypes.data
        low_at = high_at + R * K
        shifts_at, sums_at = shifts_RJL.ctypes.data, sums_RJ.ctypes.data
        for r in range(R):
            sums = _dot_nibbles(
                high_at + r * K, low_at + r * K, shifts_at + r * J * 64, sums_at + r * (J + 16) * 4,
                first_at, scale, zero, n * J, J, G,
            )  # fmt: skip
            for i in range(4):
                y = sums[i] * steps_R[r]
                store(out, r * N + n + i, y + load(bias, n + i) if bias_at else y)


@device
def _split(x, at, high, low, K, is_signed):
    """Writes a row's bytes; gives its step, which is no number where one of x is none."""
    # Without a sign a code is moved by half the range; with one, a low byte above 127 is one less in the high byte.
    most, moved, flipped = (32639, 128, 128) if is_signed else (32767, 32768, 0)
    peak, odd = np.float32(0), np.float32(0)
    for k in range(K):
        value = load(x, at + k)
        peak = max(peak, abs(value))
        odd += value * np.float32(0)  # NaN where it is infinite or NaN
    inverse = np.float32(most) / peak if peak > 0 and odd == 0 else np.float32(0)
    for k in range(K):
        value = load(x, at + k) * inverse if inverse > 0 else np.float32(0)
        code = np.int32(np.rint(value)) + moved
        high[k] = code >> 8
        low[k] = (code & 255) ^ flipped
    return peak / np.float32(most) + odd


@intrinsic
def _dot_nibbles(context, high_at, low_at, shifts_at, sums_at, weight_at, scale, zero, first, J, G):
    """sum over k of (256 * high[k] + low[k]) * ((nibble[n, k] - 8) * scale[n, j] + zero[n, j]), j = k // G, for four
    rows n, in fp32; within a group in integers, exact. `first`: where the rows' scales and zeros begin.
    """
    word, long = ir.IntType(32), ir.IntType(64)
    bytes_, words = ir.VectorType(ir.IntType(8), VECTOR_BYTES), ir.VectorType(word, 16)
    halves, floats = ir.VectorType(ir.IntType(16), 16), ir.VectorType(ir.FloatType(), 16)

    def every(kind, value):
        return ir.Constant(kind, [value] * kind.count)

    def generate(context, builder, signature, arguments):
        high_at, low_at, shifts_at, sums_at, weight_at, scale, zero, first, J, G = arguments
        multiply = builder.module.declare_intrinsic(
            "llvm.x86.avx512.vpdpbusd.512", [], ir.FunctionType(words, [words, bytes_, bytes_])
        )
        totals = [cgutils.alloca_once_value(builder, every(floats, 0.0)) for _ in range(BLOCK_N)]
        parts = [cgutils.alloca_once(builder, words) for _ in range(2 * BLOCK_N)]

        def vector(kind, address, offset):
            place = builder.inttoptr(builder.add(address, offset), kind.as_pointer())
            return builder.load(place, align=1)

        def times(value, factor):
            return builder.mul(value, ir.Constant(long, factor))

        def accumulate(n, a, b):
            product = builder.fmul(a, b, flags=("contract",))
            builder.store(builder.fadd(builder.load(totals[n]), product, ("contract",)), totals[n])

        def row(n):
            return builder.add(first, times(J, n))

        begin = ir.Constant(long, 0)
        with cgutils.for_range_slice(builder, begin, J, ir.Constant(long, 1), long) as (j, _):
            shift = vector(words, shifts_at, times(j, 64))
            for i, place in enumerate(parts):
                builder.store(shift if i % 2 else every(words, 0), place)
            start, step = builder.mul(j, G), ir.Constant(long, VECTOR_BYTES)
            with cgutils.for_range_slice(builder, start, builder.add(start, G), step, long) as (
                k,
                _,
            ):
                x = vector(bytes_, high_at, k), vector(bytes_, low_at, k)
                for pair in range(BLOCK_N // 2):
                    offset = builder.add(times(k, 2), ir.Constant(long, pair * VECTOR_BYTES))
                    both = vector(bytes_, weight_at, offset)
                    lower, upper = (
                        builder.and_(both, every(bytes_, 15)),
                        builder.lshr(both, every(bytes_, 4)),
                    )
                    for i, nibbles in enumerate((lower, lower, upper, upper)):
                        place = parts[4 * pair + i]
                        added = builder.call(multiply, [builder.load(place), nibbles, x[i % 2]])
                        builder.store(added, place)
            for n in range(BLOCK_N):
                high, low = builder.load(parts[2 * n]), builder.load(parts[2 * n + 1])
                dot = builder.sitofp(builder.add(builder.shl(high, every(words, 8)), low), floats)
                bits = builder.zext(
                    builder.load(builder.gep(scale, [builder.add(row(n), j)])), word
                )
                factor = builder.bitcast(builder.shl(bits, ir.Constant(word, 16)), ir.FloatType())
                accumulate(n, dot, _spread(builder, factor, floats))
        with cgutils.for_range_slice(builder, begin, J, ir.Constant(long, 16), long) as (j, _):
            sums = vector(floats, sums_at, times(j, 4))
            for n in range(BLOCK_N):
                place = builder.bitcast(
                    builder.gep(zero, [builder.add(row(n), j)]), halves.as_pointer()
                )
                bits = builder.zext(builder.load(place, align=1), words)
                accumulate(n, builder.bitcast(builder.shl(bits, every(words, 16)), floats), sums)
        add_up = builder.module.declare_intrinsic(
            "llvm.vector.reduce.fadd.v16f32",
            [],
            ir.FunctionType(ir.FloatType(), [ir.FloatType(), floats]),
        )
        nothing = ir.Constant(ir.FloatType(), -0.0)
        found = [
            builder.call(add_up, [nothing, builder.load(total)], fastmath=("reassoc",))
            for total in totals
        ]
        return context.make_tuple(builder, signature.return_type, found)

    int64 = types.int64
    result = types.UniTuple(types.float32, BLOCK_N)
    return result(int64, int64, int64, int64, int64, scale, zero, int64, int64, int64), generate


def _spread(builder, value, kind):
    """A vector of one value."""
    word = ir.IntType(32)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(word, 0))
    order = ir.Constant(ir.VectorType(word, kind.count), [0] * kind.count)
    return builder.shuffle_vector(first, first, order)
