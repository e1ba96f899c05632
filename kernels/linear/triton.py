"""y = x @ weight.T for few tokens, at the speed of the weights' memory.

Both kernels give one program BLOCK_N rows of the weight. Around the product they can do what would otherwise be
launches of their own:

    squares   x is h * gain of an RMS norm's input h; y is multiplied by rsqrt(mean(h^2) + EPS), the sum of h^2 found
              in NUM_SQUARES parts
    rows      x's rows are gathered: token t reads row rows[t]
    residual  is added to the result
    gain      the result is the next norm's input h: h * gain goes to `normed`, each program's part of the sum of h^2
              to `squares_out`
    EPILOGUE  "silu_mul": rows n and n + N/2 are gate and up, silu(gate) * up is stored
              "rope": rows n and n + D/2 of a head are rotated; q is stored, k and v go to the KV cache

So a norm costs no launch and no pass over x: its gain rides on the kernel before, its division on the one after.
With PDL the next kernel starts early: the first weight tiles, which no kernel writes, are loaded before
`gdc_wait`, so that memory stays busy across kernel borders.
Source: NVIDIA, PTX ISA, griddepcontrol; Zhang and Sennrich 2019 (RMSNorm); Su et al. 2021 (RoPE).
"""

import triton
import triton.language as tl

from kernels.linear.triton_epilogue import (
    finish,
    load_squares,
    load_sum,
    load_tile,
    load_turns,
    row_pair,
)
from kernels.linear.triton_int4 import dense_int4 as dense_int4
from kernels.linear.triton_int4 import linear_one_int4 as linear_one_int4
from kernels.linear.triton_int4_many import linear_many_int4 as linear_many_int4
from kernels.linear.triton_int4_one import linear_one_int4_mma as linear_one_int4_mma
from kernels.linear.triton_int8 import dense_int8 as dense_int8
from kernels.linear.triton_widen import as_float, int4_values


@triton.jit
def linear_one(
    x, weight, scale, bias, squares, rows, residual, gain, out, normed, squares_out,
    positions, rope, slots, k_cache, v_cache,
    N: tl.constexpr, K: tl.constexpr, EPS: tl.constexpr, NUM_SQUARES: tl.constexpr,
    EPILOGUE: tl.constexpr, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr, FORMAT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PREFETCH: tl.constexpr, VECTOR: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One token: multiply and add, K held across threads, one reduction at the end."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    index = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    OUTPUTS: tl.constexpr = N if EPILOGUE == "plain" else N // 2
    if OUTPUTS % BLOCK_N != 0:
        index_in = tl.minimum(index, OUTPUTS - 1)
    else:
        index_in = index
    n, n_second = row_pair(index_in, EPILOGUE, N, HEAD_DIM)
    k = tl.arange(0, BLOCK_K)
    if VECTOR:
        k = tl.max_contiguous(tl.multiple_of(k, VECTOR), VECTOR)
    at = weight + n[:, None].to(tl.int64) * K + k[None, :]
    at_second = weight + n_second[:, None].to(tl.int64) * K + k[None, :]
    PAIRED: tl.constexpr = EPILOGUE != "plain"
    CHUNKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    early_0 = load_tile(at, k[None, :], K, BLOCK_K)
    early_1 = early_0
    early_second = early_0
    if PREFETCH > 1 and CHUNKS > 1:
        early_1 = load_tile(at + BLOCK_K, BLOCK_K + k[None, :], K, BLOCK_K)
    if PAIRED:
        early_second = load_tile(at_second, k[None, :], K, BLOCK_K)
    token = tl.arange(0, 1)
    cos, sin, slot = load_turns(n, token, token == 0, positions, rope, slots, EPILOGUE, HEAD_DIM)
    if PDL:
        tl.extra.cuda.gdc_wait()
    # A short product is soon done and would wait for what it is added to; in a long one that takes registers in which
    # more programs have room.
    IS_SHORT: tl.constexpr = CHUNKS <= 2
    if IS_SHORT:
        residual_tile, gains = load_sum(index, n, token, 1, residual, gain, N)
    source = token
    if rows is not None:
        source = tl.load(rows + token)
        x += tl.load(rows).to(tl.int64) * K
    if squares is not None:
        parts = load_squares(squares, source, token == 0, NUM_SQUARES)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    acc_second = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for c in tl.static_range(CHUNKS):
        kc = c * BLOCK_K + k
        xc = load_tile(x + kc, kc, K, BLOCK_K).to(tl.float32)
        if c == 0:
            tile = early_0
        elif c == 1 and PREFETCH > 1:
            tile = early_1
        else:
            tile = load_tile(at + c * BLOCK_K, kc[None, :], K, BLOCK_K)
        acc += as_float(tile, FORMAT) * xc[None, :]
        if PAIRED:
            if c == 0:
                tile = early_second
            else:
                tile = load_tile(at_second + c * BLOCK_K, kc[None, :], K, BLOCK_K)
            acc_second += as_float(tile, FORMAT) * xc[None, :]
    first = tl.sum(acc, 1)[:, None]
    second = first
    if PAIRED:
        second = tl.sum(acc_second, 1)[:, None]
    if squares is not None:
        rstd = tl.rsqrt(tl.sum(parts, 1) / K + EPS)[None, :]
        first *= rstd
        second *= rstd
    if not IS_SHORT:
        residual_tile, gains = load_sum(index, n, token, 1, residual, gain, N)
    finish(
        first, second, index, n, n_second, token, 1, scale, bias, residual_tile, gains,
        cos, sin, slot, out, normed, squares_out, k_cache, v_cache,
        N, EPILOGUE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_TOKENS,
    )  # fmt: skip


@triton.jit
def _weight_tile(at, start, k, K: tl.constexpr, BLOCK_K: tl.constexpr, VALUES: tl.constexpr):
    """The stored chunk that begins at column `start`; rows of words are padded to whole chunks."""
    if VALUES > 1:
        return tl.load(at + start // VALUES)
    return load_tile(at + start, start + k[None, :], K, BLOCK_K)


@triton.jit
def _word_products(
    acc, acc_second, tile, tile_second, x_at, scale, start, k, n, n_second, is_token,
    N: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, VALUES: tl.constexpr,
    PAIRED: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """One chunk of K: words hold a value of each of its parts, which for int4 are its groups."""
    PART: tl.constexpr = BLOCK_K // VALUES
    for i in tl.static_range(VALUES):
        is_x = is_token[None, :]
        if K % BLOCK_K != 0:
            is_x = is_x & (start + i * PART + k < K)[:, None]
        xc = tl.load(x_at + start + i * PART, mask=is_x, other=0)
        groups = scale + start // BLOCK_K * N * 4 + i
        acc = tl.dot(int4_values(tile, tl.load(groups + n * 4), i, FORMAT), xc, acc)
        if PAIRED:
            values = int4_values(tile_second, tl.load(groups + n_second * 4), i, FORMAT)
            acc_second = tl.dot(values, xc, acc_second)
    return acc, acc_second


@triton.jit
def _products(
    acc, acc_second, tile, tile_second, x_at, kc, is_token,
    K: tl.constexpr, BLOCK_K: tl.constexpr, PAIRED: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """One chunk of K: x is [BLOCK_K, BLOCK_M], tokens in the dot's narrow dim."""
    is_x = is_token[None, :]
    if K % BLOCK_K != 0:
        is_x = is_x & (kc < K)[:, None]
    xc = tl.load(x_at, mask=is_x, other=0.0)
    IS_WIDENED: tl.constexpr = FORMAT != "plain" and FORMAT != "int8_int8" and FORMAT != "fp8_fp8"
    if IS_WIDENED:
        tile = as_float(tile, FORMAT).to(xc.dtype)
    acc = tl.dot(tile, xc, acc, out_dtype=acc.dtype)
    if PAIRED:
        if IS_WIDENED:
            tile_second = as_float(tile_second, FORMAT).to(xc.dtype)
        acc_second = tl.dot(tile_second, xc, acc_second, out_dtype=acc.dtype)
    return acc, acc_second


@triton.jit
def _sum_parts(
    partial, base, tile_at, acc,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, SPLIT_K: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """The sum of all splits' parts, in their order; read past L1, other programs wrote them."""
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for s in tl.static_range(SPLIT_K):
        total += tl.load(partial + (base + s) * STRIDE + tile_at, cache_modifier=".cg")
    return total


@triton.jit
def linear_few(
    x, weight, scale, bias, squares, rows, residual, gain, out, normed, squares_out,
    positions, rope, slots, k_cache, v_cache, partial, counters, x_scale, num_tokens,
    N: tl.constexpr, K: tl.constexpr, EPS: tl.constexpr, NUM_SQUARES: tl.constexpr,
    EPILOGUE: tl.constexpr, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr, FORMAT: tl.constexpr, VALUES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
    PREFETCH: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Up to BLOCK_M tokens a program: tensor cores, weight rows in the dot's wide dim.

    `x_scale`: of each token of an x in 8 bits. Products of int8 with int8 are summed in int32.
    With SPLIT_K > 1 as many programs share a tile's K; the last to finish adds the parts up. `partial` is scratch,
    `counters` start at 0 and are left at 0.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    index = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    OUTPUTS: tl.constexpr = N if EPILOGUE == "plain" else N // 2
    if OUTPUTS % BLOCK_N != 0:
        index_in = tl.minimum(index, OUTPUTS - 1)
    else:
        index_in = index
    n, n_second = row_pair(index_in, EPILOGUE, N, HEAD_DIM)
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_token = tokens < num_tokens
    IS_INT4: tl.constexpr = FORMAT == "int4" or FORMAT == "int4_any"  # scales are the groups'
    ROW: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K * BLOCK_K // VALUES if VALUES > 1 else K
    k = tl.arange(0, BLOCK_K // VALUES)
    SHARE: tl.constexpr = (K + SPLIT_K * BLOCK_K - 1) // (SPLIT_K * BLOCK_K) * BLOCK_K
    begin = tl.program_id(2) * SHARE
    end = tl.minimum(begin + SHARE, K)
    at = weight + n[:, None].to(tl.int64) * ROW + k[None, :]
    at_second = weight + n_second[:, None].to(tl.int64) * ROW + k[None, :]
    PAIRED: tl.constexpr = EPILOGUE != "plain"
    if PREFETCH:
        tile = _weight_tile(at, begin, k, K, BLOCK_K, VALUES)
        tile_second = tile
        if PAIRED:
            tile_second = _weight_tile(at_second, begin, k, K, BLOCK_K, VALUES)
    if PDL:
        tl.extra.cuda.gdc_wait()
    source = tokens
    if rows is not None:
        source = tl.load(rows + tokens, mask=is_token, other=0)
    if squares is not None:
        parts = load_squares(squares, source, is_token, NUM_SQUARES)
    x_at = x + source[None, :].to(tl.int64) * K + k[:, None]
    SUM: tl.constexpr = tl.int32 if FORMAT == "int8_int8" else tl.float32
    acc = tl.zeros((BLOCK_N, BLOCK_M), SUM)
    acc_second = tl.zeros((BLOCK_N, BLOCK_M), SUM)
    if PREFETCH:
        if VALUES > 1:
            acc, acc_second = _word_products(
                acc, acc_second, tile, tile_second, x_at, scale, begin, k, n, n_second, is_token,
                N, K, BLOCK_K, VALUES, PAIRED, FORMAT,
            )  # fmt: skip
        else:
            acc, acc_second = _products(
                acc, acc_second, tile, tile_second, x_at + begin, begin + k, is_token,
                K, BLOCK_K, PAIRED, FORMAT,
            )  # fmt: skip
        begin += BLOCK_K
    for start in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        tile = _weight_tile(at, start, k, K, BLOCK_K, VALUES)
        tile_second = tile
        if PAIRED:
            tile_second = _weight_tile(at_second, start, k, K, BLOCK_K, VALUES)
        if VALUES > 1:
            acc, acc_second = _word_products(
                acc, acc_second, tile, tile_second, x_at, scale, start, k, n, n_second, is_token,
                N, K, BLOCK_K, VALUES, PAIRED, FORMAT,
            )  # fmt: skip
        else:
            acc, acc_second = _products(
                acc, acc_second, tile, tile_second, x_at + start, start + k, is_token,
                K, BLOCK_K, PAIRED, FORMAT,
            )  # fmt: skip
    if x_scale is not None:
        of_token = tl.load(x_scale + source, mask=is_token, other=0)[None, :]
        acc = acc.to(tl.float32) * of_token
        acc_second = acc_second.to(tl.float32) * of_token
    if SPLIT_K > 1:
        STRIDE: tl.constexpr = BLOCK_N * BLOCK_M * (2 if PAIRED else 1)
        tile_id = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        base = tile_id.to(tl.int64) * SPLIT_K
        i = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        here = partial + (base + tl.program_id(2)) * STRIDE + i
        tl.store(here, acc)
        if PAIRED:
            tl.store(here + BLOCK_N * BLOCK_M, acc_second)
        tl.debug_barrier()  # all of this program's stores come before its count
        if tl.atomic_add(counters + tile_id, 1, sem="acq_rel") < SPLIT_K - 1:
            return
        tl.store(counters + tile_id, 0)
        acc = _sum_parts(partial, base, i, acc, BLOCK_N, BLOCK_M, SPLIT_K, STRIDE)
        if PAIRED:
            i += BLOCK_N * BLOCK_M
            acc_second = _sum_parts(partial, base, i, acc, BLOCK_N, BLOCK_M, SPLIT_K, STRIDE)
    if squares is not None:
        rstd = tl.rsqrt(tl.sum(parts, 1) / K + EPS)[None, :]
        acc *= rstd
        acc_second *= rstd
    cos, sin, slot = load_turns(n, tokens, is_token, positions, rope, slots, EPILOGUE, HEAD_DIM)
    residual_tile, gains = load_sum(index, n, tokens, num_tokens, residual, gain, N)
    finish(
        acc, acc_second, index, n, n_second, tokens, num_tokens, None if IS_INT4 else scale, bias,
        residual_tile, gains, cos, sin, slot, out, normed, squares_out, k_cache, v_cache,
        N, EPILOGUE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_TOKENS,
    )  # fmt: skip


@triton.jit
def quantize_rows(
    x, out, scale_out, scale, K: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """Each row of x as e4m3 or int8 and its scale, `scale` or else amax / MOST: what 8-bit products read."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    value = tl.load(x + row * K + k, mask=k < K, other=0).to(tl.float32)
    # NaN and infinity make the scale NaN, as int8 cannot hold them and a clamp would take them for the largest value.
    not_finite = tl.sum(value * 0, 0)
    if scale is None:
        of_row = tl.maximum(tl.max(tl.abs(value), 0) / MOST, 1e-12)
        value = value / of_row
    else:
        of_row = scale
        value = tl.minimum(tl.maximum(value / of_row, -MOST), MOST)
    tl.store(scale_out + row, of_row + not_finite)
    if out.dtype.element_ty == tl.int8:
        value = (
            value + 12582912.0
        ) - 12582912.0  # 1.5 * 2 ** 23: to the nearest integer, ties to even
    tl.store(out + row * K + k, value.to(out.dtype.element_ty), mask=k < K)
