"""`linear` on a CPU that multiplies bytes (AVX512 VNNI): any number of rows, sums exact in integers.

Legend: R rows of x, N out, K in, P bytes of each x.
"""

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.cpu_jit import device, kernel, load, of_bits, spread, store, to_bits, typed

# Weight rows of one task, two vectors of sums; a value of each, four times, is what an instruction reads.
PANEL_ROWS = 32
PANEL_COLUMNS = 4
# Rows of codes whose sums are in registers together: 16 of 32 are sums, which hides a product's latency.
_BLOCK_ROWS = 8
# Rows of x of one task: their codes stay in a core's second cache while panels go by.
_TASK_ROWS = 96
# How far ahead of its reading a weight is asked for, in bytes; as in `cpu_kernel.py`.
_AHEAD_BYTES = 9216
_VECTOR_BYTES = 64
_INFINITY_BITS = 0x7F800000


@kernel
def rows_of_bytes(
    x_at, weight_at, scale_at, bias_at, out_at, R, N, K, P, x_tag, scale_tag, code_tag, dot_tag
):
    """out[r, n] = scale[n] * sum_k x[r, k] * weight[n, k] + bias[n], of int8 weights; x in codes of P bytes.

        P = 1: x[r, k] = step[r] * code[r, k],  step[r] = max over k of |x[r, k]| / 127
        P = 2: x[r, k] = step[r] * (256 * high[r, k] + low[r, k]),  step[r] = max over k of |x[r, k]| / (127 * 257)

    So two bytes keep 15 bits below a row's largest magnitude, where bf16 has 8 of each value. Bytes of x have a sign,
    so those of weights must not. weight: uint8 [ceil(N / 32), K / 4, 32, 4], each moved by 128; `bias_at` is 0 where
    there is none. A row of x that is not finite gives NaN. K is a multiple of PANEL_COLUMNS.
    """
    codes_CK = np.empty((R * P, K), np.int8)
    moved_C, steps_R = np.empty(R * P, np.int32), np.empty(R, np.float32)
    x = typed(x_at, x_tag)
    if R == 1:  # waking the other threads costs more
        _split(x, 0, codes_CK, moved_C, steps_R, K, P)
    else:
        for r in prange(R):
            _split(x, r, codes_CK, moved_C, steps_R, K, P)
    panels = (N + PANEL_ROWS - 1) // PANEL_ROWS
    for task in prange(panels * ((R + _TASK_ROWS - 1) // _TASK_ROWS)):
        first = task // panels * _TASK_ROWS
        n = task % panels * PANEL_ROWS
        # Here, so that the loop is seen to read the bytes: Numba moves what it thinks independent.
        codes_at, moved, steps = codes_CK.ctypes.data, moved_C.ctypes.data, steps_R.ctypes.data
        _multiply_panel(
            codes_at, typed(moved, dot_tag), typed(steps, scale_tag), weight_at + n * K, typed(scale_at, scale_tag),
            bias_at != 0, typed(bias_at, scale_tag), typed(out_at, x_tag), first, min(first + _TASK_ROWS, R),
            n, N, K, P, dot_tag,
        )  # fmt: skip


@device
def _multiply_panel(
    codes_at, moved, steps, weight_at, scale, has_bias, bias, out, first, end, n, N, K, P, dot_tag
):
    """Columns n to n + 32, or to N, of rows first to end of out."""
    dots_at = np.empty((_BLOCK_ROWS, PANEL_ROWS), np.int32)
    dots = typed(dots_at.ctypes.data, dot_tag)
    c, last = first * P, end * P
    while c < last:
        at = codes_at + c * K
        ahead = _AHEAD_BYTES if c == first * P else 0  # then it is in the caches
        if c + 8 <= last:
            rows = 8
            _dots_of_8(at, weight_at, dots_at.ctypes.data, K, ahead)
        elif c + 4 <= last:
            rows = 4
            _dots_of_4(at, weight_at, dots_at.ctypes.data, K, ahead)
        elif c + 2 <= last:
            rows = 2
            _dots_of_2(at, weight_at, dots_at.ctypes.data, K, ahead)
        else:
            rows = 1
            _dots_of_1(at, weight_at, dots_at.ctypes.data, K, ahead)
        for i in range(0, rows, P):
            r = (c + i) // P
            step, place = steps[r], r * N + n
            for j in range(min(PANEL_ROWS, N - n)):
                total = np.int64(dots[i * PANEL_ROWS + j] - moved[c + i])
                if P == 2:
                    total = (total << 8) + (dots[(i + 1) * PANEL_ROWS + j] - moved[c + i + 1])
                y = np.float32(total) * (step * scale[n + j])
                store(out, place + j, y + bias[n + j] if has_bias else y)
        c += rows
    dots_at[0, 0] = 0  # its last use: until here it is not freed


@device
def _split(x, r, codes_CK, moved_C, steps_R, K, P):
    """Writes a row's codes, 128 times their sums, and its step, which is no number where one of x is none."""
    at, c = r * K, r * P
    peak_bits = np.int32(0)
    # Numbers without a sign are ordered as their bits, whose maximum makes a vector.
    for k in range(K):
        peak_bits = max(peak_bits, to_bits(load(x, at + k)) & np.int32(0x7FFFFFFF))
    peak = of_bits(peak_bits)
    most = np.float32(127 if P == 1 else 127 * 257)
    is_usable = 0 < peak_bits < _INFINITY_BITS
    inverse = most / peak if is_usable else np.float32(0)
    steps_R[r] = peak / most if peak_bits < _INFINITY_BITS else np.float32(np.nan)
    total, low_total = np.int32(0), np.int32(0)
    if P == 1:
        row = codes_CK[c]
        for k in range(K):
            code = np.int32(np.rint(load(x, at + k) * inverse))
            row[k] = code
            total += code
    else:
        high, low = codes_CK[c], codes_CK[c + 1]
        for k in range(K):
            # A low byte beyond 127 is a negative one, and one more in the high byte.
            code = np.int32(np.rint(load(x, at + k) * inverse)) + np.int32(128)
            upper = code >> 8
            lower = (code & 255) - np.int32(128)
            high[k] = upper
            low[k] = lower
            total += upper
            low_total += lower
        moved_C[c + 1] = low_total << 7
    moved_C[c] = total << 7


def _dots_of(num_rows):
    """An intrinsic: int32 [num_rows, 32] to `dots_at`, of as many rows of codes with a panel of weights."""

    @intrinsic
    def dots(context, codes_at, weight_at, dots_at, K, ahead):
        byte, word, long = (ir.IntType(size) for size in (8, 32, 64))
        words, vector = ir.VectorType(word, 16), ir.VectorType(byte, _VECTOR_BYTES)

        def generate(context, builder, signature, arguments):
            codes_at, weight_at, dots_at, K, ahead = arguments
            multiply = builder.module.declare_intrinsic(
                "llvm.x86.avx512.vpdpbusd.512", [], ir.FunctionType(words, [words, vector, vector])
            )
            ask = ir.FunctionType(ir.VoidType(), [byte.as_pointer(), word, word, word])
            ask = builder.module.declare_intrinsic("llvm.prefetch", [byte.as_pointer()], ask)
            hint = [ir.Constant(word, value) for value in (0, 2, 1)]  # to read, second level, data
            zero = ir.Constant(words, [0] * 16)
            sums = [
                [cgutils.alloca_once_value(builder, zero) for _ in range(2)]
                for _ in range(num_rows)
            ]

            def at(kind, address):
                return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)

            def plus(address, offset):
                return builder.add(address, ir.Constant(long, offset))

            begin, step = ir.Constant(long, 0), ir.Constant(long, PANEL_COLUMNS)
            with cgutils.for_range_slice(builder, begin, K, step, long) as (k, _):
                here = builder.add(weight_at, builder.mul(k, ir.Constant(long, PANEL_ROWS)))
                weights = [at(vector, plus(here, _VECTOR_BYTES * half)) for half in range(2)]
                for half in range(2):
                    later = builder.add(plus(here, _VECTOR_BYTES * half), ahead)
                    builder.call(ask, [builder.inttoptr(later, byte.as_pointer()), *hint])
                row_at = builder.add(codes_at, k)
                for row in range(num_rows):
                    four = spread(builder, at(word, row_at), words)
                    four = builder.bitcast(four, vector)
                    for weight, place in zip(weights, sums[row], strict=True):
                        added = builder.call(multiply, [builder.load(place), weight, four])
                        builder.store(added, place)
                    row_at = builder.add(row_at, K)
            for i, place in enumerate(place for row in sums for place in row):
                kept_at = builder.inttoptr(plus(dots_at, _VECTOR_BYTES * i), words.as_pointer())
                builder.store(builder.load(place), kept_at, align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), generate

    return dots


_dots_of_1, _dots_of_2, _dots_of_4, _dots_of_8 = (_dots_of(rows) for rows in (1, 2, 4, 8))
