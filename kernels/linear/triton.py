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

from kernels.linear.triton_widen import (
    as_float,
    halves,
    int4_offsets,
    int4_pairs,
    int4_shifted,
    int4_slots,
    int4_values,
)


@triton.jit
def _load(pointers, k, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile whose last dim runs over k; masked only where BLOCK_K does not divide K."""
    if K % BLOCK_K == 0:
        return tl.load(pointers)
    return tl.load(pointers, mask=k < K, other=0.0)


@triton.jit
def _row_pair(index, EPILOGUE: tl.constexpr, N: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The weight rows that output `index` is made of; both the same where one is enough."""
    if EPILOGUE == "silu_mul":
        return index, index + N // 2
    if EPILOGUE == "rope":
        HALF: tl.constexpr = HEAD_DIM // 2
        first = (index // HALF) * HEAD_DIM + index % HALF
        return first, first + HALF
    return index, index


@triton.jit
def _scaled(acc, n, scale, bias):
    """Column scale, then bias; n broadcasts over tokens."""
    if scale is not None:
        acc *= tl.load(scale + n)[:, None]
    if bias is not None:
        acc += tl.load(bias + n)[:, None].to(tl.float32)
    return acc


@triton.jit
def _store_plain(
    acc, n, tokens, is_valid, residual, gain, out, normed, squares_out, N: tl.constexpr
):
    at = tokens[None, :].to(tl.int64) * N + n[:, None]
    if residual is not None:
        acc += tl.load(residual + at, mask=is_valid, other=0).to(tl.float32)
    rounded = acc.to(out.dtype.element_ty)
    tl.store(out + at, rounded, mask=is_valid)
    if gain is not None:
        h = tl.where(is_valid, rounded.to(tl.float32), 0.0)
        value = h * tl.load(gain + n)[:, None].to(tl.float32)
        tl.store(normed + at, value.to(normed.dtype.element_ty), mask=is_valid)
        part = squares_out + tokens.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
        tl.store(part, tl.sum(h * h, 0), mask=tl.max(is_valid.to(tl.int32), 0) > 0)


@triton.jit
def _squares(squares, source, is_token, NUM_SQUARES: tl.constexpr):
    """The parts of each token's sum of squares that the kernel before left; loaded early, summed late."""
    PADDED: tl.constexpr = triton.next_power_of_2(NUM_SQUARES)
    i = tl.arange(0, PADDED)
    return tl.load(
        squares + source[:, None].to(tl.int64) * NUM_SQUARES + i[None, :],
        mask=is_token[:, None] & (i < NUM_SQUARES)[None, :],
        other=0,
    )


@triton.jit
def _store_rope(
    first, second, n, tokens, is_token, is_valid, out, positions, rope, slots, k_cache, v_cache,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """`rope` is [positions, cos of HEAD_DIM / 2 then sin]. A slot below 0 is padding: not written."""
    HALF: tl.constexpr = HEAD_DIM // 2
    Q: tl.constexpr = NUM_HEADS * HEAD_DIM
    KV: tl.constexpr = NUM_KV_HEADS * HEAD_DIM
    position = tl.load(positions + tokens, mask=is_token, other=0).to(tl.int64)
    slot = tl.load(slots + tokens, mask=is_token, other=-1).to(tl.int64)
    angle = rope + position[None, :] * HEAD_DIM + (n % HEAD_DIM)[:, None]
    cos = tl.load(angle)
    sin = tl.load(angle + HALF)
    is_q = is_valid & (n < Q)[:, None]
    is_k = is_valid & ((n >= Q) & (n < Q + KV))[:, None] & (slot >= 0)[None, :]
    is_v = is_valid & (n >= Q + KV)[:, None] & (slot >= 0)[None, :]
    low = first * cos - second * sin
    high = second * cos + first * sin
    at = out + tokens[None, :].to(tl.int64) * Q + n[:, None]
    tl.store(at, low.to(out.dtype.element_ty), mask=is_q)
    tl.store(at + HALF, high.to(out.dtype.element_ty), mask=is_q)
    at = k_cache + slot[None, :] * KV + (n - Q)[:, None]
    tl.store(at, low.to(k_cache.dtype.element_ty), mask=is_k)
    tl.store(at + HALF, high.to(k_cache.dtype.element_ty), mask=is_k)
    at = v_cache + slot[None, :] * KV + (n - Q - KV)[:, None]
    tl.store(at, first.to(v_cache.dtype.element_ty), mask=is_v)
    tl.store(at + HALF, second.to(v_cache.dtype.element_ty), mask=is_v)


@triton.jit
def _finish(
    first, second, index, n, n_second, tokens, num_tokens, scale, bias, residual, gain, out,
    normed, squares_out, positions, rope, slots, k_cache, v_cache,
    N: tl.constexpr, EPILOGUE: tl.constexpr,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    OUTPUTS: tl.constexpr = N if EPILOGUE == "plain" else N // 2
    is_token = tokens < num_tokens
    is_valid = (index < OUTPUTS)[:, None] & is_token[None, :]
    if OUTPUTS % BLOCK_N != 0:
        n = tl.where(index < OUTPUTS, n, 0)
        n_second = tl.where(index < OUTPUTS, n_second, 0)
    first = _scaled(first, n, scale, bias)
    if EPILOGUE == "plain":
        _store_plain(first, n, tokens, is_valid, residual, gain, out, normed, squares_out, N)
    else:
        second = _scaled(second, n_second, scale, bias)
        if EPILOGUE == "silu_mul":
            value = first * tl.sigmoid(first) * second
            _store_plain(value, n, tokens, is_valid, None, None, out, None, None, N // 2)
        else:
            _store_rope(
                first, second, n, tokens, is_token, is_valid, out, positions, rope, slots,
                k_cache, v_cache,
                NUM_HEADS, NUM_KV_HEADS, HEAD_DIM,
            )  # fmt: skip


@triton.jit
def linear_one(
    x, weight, scale, bias, squares, rows, residual, gain, out, normed, squares_out,
    positions, rope, slots, k_cache, v_cache,
    N: tl.constexpr, K: tl.constexpr, EPS: tl.constexpr, NUM_SQUARES: tl.constexpr,
    EPILOGUE: tl.constexpr, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, FORMAT: tl.constexpr,
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
    n, n_second = _row_pair(index_in, EPILOGUE, N, HEAD_DIM)
    k = tl.arange(0, BLOCK_K)
    if VECTOR:
        k = tl.max_contiguous(tl.multiple_of(k, VECTOR), VECTOR)
    at = weight + n[:, None].to(tl.int64) * K + k[None, :]
    at_second = weight + n_second[:, None].to(tl.int64) * K + k[None, :]
    PAIRED: tl.constexpr = EPILOGUE != "plain"
    CHUNKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    early_0 = _load(at, k[None, :], K, BLOCK_K)
    early_1 = early_0
    early_second = early_0
    if PREFETCH > 1 and CHUNKS > 1:
        early_1 = _load(at + BLOCK_K, BLOCK_K + k[None, :], K, BLOCK_K)
    if PAIRED:
        early_second = _load(at_second, k[None, :], K, BLOCK_K)
    if PDL:
        tl.extra.cuda.gdc_wait()
    token = tl.arange(0, 1)
    source = token
    if rows is not None:
        source = tl.load(rows + token)
        x += tl.load(rows).to(tl.int64) * K
    if squares is not None:
        parts = _squares(squares, source, token == 0, NUM_SQUARES)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    acc_second = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for c in tl.static_range(CHUNKS):
        kc = c * BLOCK_K + k
        xc = _load(x + kc, kc, K, BLOCK_K).to(tl.float32)
        if c == 0:
            tile = early_0
        elif c == 1 and PREFETCH > 1:
            tile = early_1
        else:
            tile = _load(at + c * BLOCK_K, kc[None, :], K, BLOCK_K)
        acc += as_float(tile, FORMAT) * xc[None, :]
        if PAIRED:
            if c == 0:
                tile = early_second
            else:
                tile = _load(at_second + c * BLOCK_K, kc[None, :], K, BLOCK_K)
            acc_second += as_float(tile, FORMAT) * xc[None, :]
    first = tl.sum(acc, 1)[:, None]
    second = first
    if PAIRED:
        second = tl.sum(acc_second, 1)[:, None]
    if squares is not None:
        rstd = tl.rsqrt(tl.sum(parts, 1) / K + EPS)[None, :]
        first *= rstd
        second *= rstd
    _finish(
        first, second, index, n, n_second, token, 1, scale, bias, residual, gain, out, normed,
        squares_out, positions, rope, slots, k_cache, v_cache,
        N, EPILOGUE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_N,
    )  # fmt: skip


@triton.jit
def _int4_sums(acc, words, groups, low, high, PART: tl.constexpr):
    """acc [BLOCK_N, quads] and what nibble PART of each word adds to it; `groups` are that part's."""
    w_low, w_high = int4_pairs(words, PART)
    products = tl.sum(w_low * low[None] + w_high * high[None], 2)
    offset = tl.sum(int4_offsets(low, high, PART), 1)
    scale, zero = halves(groups, tl.bfloat16)
    acc += scale * (products - offset[None, :])
    return acc + zero * tl.sum(low + high, 1)[None, :]


@triton.jit
def linear_one_int4(
    x, weight, scale, bias, squares, rows, residual, gain, out, normed, squares_out,
    positions, rope, slots, k_cache, v_cache,
    N: tl.constexpr, K: tl.constexpr, EPS: tl.constexpr, NUM_SQUARES: tl.constexpr,
    EPILOGUE: tl.constexpr, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`linear_one` for int4: a thread multiplies quads, four int32 words of one row: 32 values of four groups."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    index = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    OUTPUTS: tl.constexpr = N if EPILOGUE == "plain" else N // 2
    index_in = tl.minimum(index, OUTPUTS - 1) if OUTPUTS % BLOCK_N != 0 else index
    n, n_second = _row_pair(index_in, EPILOGUE, N, HEAD_DIM)
    PAIRED: tl.constexpr = EPILOGUE != "plain"
    QUADS: tl.constexpr = BLOCK_K // 32
    OF_CHUNK: tl.constexpr = GROUP // 8  # quads of four groups
    ROW: tl.constexpr = (K + 4 * GROUP - 1) // (4 * GROUP) * OF_CHUNK
    BLOCKS: tl.constexpr = (ROW + QUADS - 1) // QUADS
    q, four = tl.arange(0, QUADS), tl.arange(0, 4)
    chunk, inside = q // OF_CHUNK, q % OF_CHUNK
    row = n.to(tl.int64)[:, None, None]
    row_second = n_second.to(tl.int64)[:, None, None]
    words_at = weight.to(tl.pointer_type(tl.int32), bitcast=True) + q[None, :, None] * 4 + four
    groups_at = scale + chunk[None, :, None] * (N * 4) + four
    is_quad = (q < ROW)[None, :, None]
    words = tl.load(words_at + row * (ROW * 4), mask=is_quad, other=0)
    groups = tl.load(groups_at + row * 4, mask=is_quad, other=0)
    words_second, groups_second = words, groups
    if PAIRED:
        words_second = tl.load(words_at + row_second * (ROW * 4), mask=is_quad, other=0)
        groups_second = tl.load(groups_at + row_second * 4, mask=is_quad, other=0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    token = tl.arange(0, 1)
    source = token
    if rows is not None:
        source = tl.load(rows + token)
        x += tl.load(rows).to(tl.int64) * K
    if squares is not None:
        parts = _squares(squares, source, token == 0, NUM_SQUARES)
    column = chunk * (2 * GROUP) + inside * 4
    x_at = x.to(tl.pointer_type(tl.int32), bitcast=True) + column[:, None] + four[None, :]
    acc = tl.zeros((BLOCK_N, QUADS), tl.float32)
    acc_second = tl.zeros((BLOCK_N, QUADS), tl.float32)
    for b in tl.static_range(BLOCKS):
        if b > 0:
            is_quad = (b * QUADS + q < ROW)[None, :, None]
            here = words_at + b * QUADS * 4
            groups_here = groups_at + b * (QUADS // OF_CHUNK) * (N * 4)
            words = tl.load(here + row * (ROW * 4), mask=is_quad, other=0)
            groups = tl.load(groups_here + row * 4, mask=is_quad, other=0)
            if PAIRED:
                words_second = tl.load(here + row_second * (ROW * 4), mask=is_quad, other=0)
                groups_second = tl.load(groups_here + row_second * 4, mask=is_quad, other=0)
        of_part = int4_slots(groups)
        of_part_second = int4_slots(groups_second)
        for i in tl.static_range(4):
            k = b * (BLOCK_K // 2) + i * (GROUP // 2)
            is_x = ((k + column) * 2 < K)[:, None]
            low, high = halves(tl.load(x_at + k, mask=is_x, other=0), x.dtype.element_ty)
            acc = _int4_sums(acc, words, of_part[i], low, high, i)
            if PAIRED:
                acc_second = _int4_sums(acc_second, words_second, of_part_second[i], low, high, i)
    first = tl.sum(acc, 1)[:, None]
    second = first
    if PAIRED:
        second = tl.sum(acc_second, 1)[:, None]
    if squares is not None:
        rstd = tl.rsqrt(tl.sum(parts, 1) / K + EPS)[None, :]
        first *= rstd
        second *= rstd
    _finish(
        first, second, index, n, n_second, token, 1, None, bias, residual, gain, out, normed,
        squares_out, positions, rope, slots, k_cache, v_cache,
        N, EPILOGUE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_N,
    )  # fmt: skip


@triton.jit
def _weight_tile(at, start, k, K: tl.constexpr, BLOCK_K: tl.constexpr, VALUES: tl.constexpr):
    """The stored chunk that begins at column `start`; rows of words are padded to whole chunks."""
    if VALUES > 1:
        return tl.load(at + start // VALUES)
    return _load(at + start, start + k[None, :], K, BLOCK_K)


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
    HEAD_DIM: tl.constexpr, FORMAT: tl.constexpr, VALUES: tl.constexpr,
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
    n, n_second = _row_pair(index_in, EPILOGUE, N, HEAD_DIM)
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
        parts = _squares(squares, source, is_token, NUM_SQUARES)
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
    _finish(
        acc, acc_second, index, n, n_second, tokens, num_tokens, None if IS_INT4 else scale, bias,
        residual, gain, out, normed, squares_out, positions, rope, slots, k_cache, v_cache,
        N, EPILOGUE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_N,
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
    if scale is None:
        of_row = tl.maximum(tl.max(tl.abs(value), 0) / MOST, 1e-12)
        value = value / of_row
    else:
        of_row = scale
        value = tl.minimum(tl.maximum(value / of_row, -MOST), MOST)
    tl.store(scale_out + row, of_row)
    if out.dtype.element_ty == tl.int8:
        value = (
            value + 12582912.0
        ) - 12582912.0  # 1.5 * 2 ** 23: to the nearest integer, ties to even
    tl.store(out + row * K + k, value.to(out.dtype.element_ty), mask=k < K)


@triton.jit
def linear_many_int4(
    x, weight, scale, bias, out, num_tokens,
    N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, FORMAT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Many tokens: a group of K a step, whose words are read four times so that x's tiles stay small."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_in = tl.minimum(n, N - 1) if N % BLOCK_N != 0 else n
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_token = tokens < num_tokens
    k = tl.arange(0, GROUP)
    ROW: tl.constexpr = (K + 4 * GROUP - 1) // (4 * GROUP) * GROUP
    at = weight + n_in[:, None].to(tl.int64) * ROW + k[None, :]
    x_at = x + tokens[None, :].to(tl.int64) * K + k[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for group in tl.range(0, K // GROUP, num_stages=STAGES):
        words = tl.load(at + group // 4 * GROUP)
        groups = tl.load(scale + (group // 4 * N + n_in) * 4 + group % 4)
        values = int4_shifted(words, groups, group % 4 * 4, FORMAT)
        xc = tl.load(x_at + group * GROUP, mask=is_token[None, :], other=0)
        acc = tl.dot(values, xc, acc)
    acc = _scaled(acc, n_in, None, bias)
    is_valid = (n < N)[:, None] & is_token[None, :]
    at_out = out + tokens[None, :].to(tl.int64) * N + n[:, None]
    tl.store(at_out, acc.to(out.dtype.element_ty), mask=is_valid)


@triton.jit
def dense_int4(
    weight, scale, out,
    N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, FORMAT: tl.constexpr,
    BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A chunk of K of some rows as values: what torch's product of many tokens reads."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = n < N
    chunk, j = tl.program_id(1), tl.arange(0, GROUP)
    ROW: tl.constexpr = (K + 4 * GROUP - 1) // (4 * GROUP) * GROUP
    at = weight + n[:, None].to(tl.int64) * ROW + chunk * GROUP + j[None, :]
    words = tl.load(at, mask=is_row[:, None], other=0)
    for i in tl.static_range(4):
        group = chunk * 4 + i
        groups = tl.load(scale + (chunk * N + n) * 4 + i, mask=is_row, other=0)
        values = int4_values(words, groups, i, FORMAT)
        k = group * GROUP + j
        tl.store(
            out + n[:, None].to(tl.int64) * K + k[None, :], values,
            mask=is_row[:, None] & (k < K)[None, :],
        )  # fmt: skip
