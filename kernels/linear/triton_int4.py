"""int4 linears for one token, and a weight widened as a whole; few tokens are `linear_few`'s."""

import triton
import triton.language as tl

from kernels.linear.triton_epilogue import (
    finish,
    load_squares,
    load_sum,
    load_turns,
    row_pair,
)
from kernels.linear.triton_widen import (
    bf16_halves,
    fp16_halves,
    int4_offsets,
    int4_pairs,
    int4_slots,
    int4_values,
)


@triton.jit
def _int4_sums(acc, words, groups, low, high, PART: tl.constexpr):
    """acc [BLOCK_N, quads] and what nibble PART of each word adds to it; `groups` are that part's."""
    w_low, w_high = int4_pairs(words, PART)
    products = tl.sum(w_low * low[None] + w_high * high[None], 2)
    offset = tl.sum(int4_offsets(low, high, PART), 1)
    scale, zero = bf16_halves(groups)
    acc += scale * (products - offset[None, :])
    return acc + zero * tl.sum(low + high, 1)[None, :]


@triton.jit
def linear_one_int4(
    x, weight, scale, bias, squares, rows, residual, gain, out, normed, squares_out,
    positions, rope, slots, k_cache, v_cache,
    N: tl.constexpr, K: tl.constexpr, EPS: tl.constexpr, NUM_SQUARES: tl.constexpr,
    EPILOGUE: tl.constexpr, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`linear_one` for int4: a thread multiplies quads, four int32 words of one row: 32 values of four groups.

    For fp16, which no engine has: bf16 goes by tensor cores (`uses_mma`), in Gluon, which Triton's interpreter does not
    run. So whole models of int4 are tested without a GPU by this.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    index = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    OUTPUTS: tl.constexpr = N if EPILOGUE == "plain" else N // 2
    index_in = tl.minimum(index, OUTPUTS - 1) if OUTPUTS % BLOCK_N != 0 else index
    n, n_second = row_pair(index_in, EPILOGUE, N, HEAD_DIM)
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
    token = tl.arange(0, 1)
    cos, sin, slot = load_turns(n, token, token == 0, positions, rope, slots, EPILOGUE, HEAD_DIM)
    if PDL:
        tl.extra.cuda.gdc_wait()
    source = token
    if rows is not None:
        source = tl.load(rows + token)
        x += tl.load(rows).to(tl.int64) * K
    if squares is not None:
        parts = load_squares(squares, source, token == 0, NUM_SQUARES)
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
            pairs = tl.load(x_at + k, mask=is_x, other=0)
            if FORMAT == "int4":
                low, high = bf16_halves(pairs)
            else:
                low, high = fp16_halves(pairs)
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
    residual_tile, gains = load_sum(index, n, token, 1, residual, gain, N)
    finish(
        first, second, index, n, n_second, token, 1, None, bias, residual_tile, gains,
        cos, sin, slot, out, normed, squares_out, k_cache, v_cache,
        N, EPILOGUE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_TOKENS,
    )  # fmt: skip


@triton.jit
def dense_int4(
    weight, scale, out,
    N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, FORMAT: tl.constexpr,
    BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A chunk of K of some rows as values: what torch's product of many tokens reads."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = n < N
    chunk, j = tl.program_id(0), tl.arange(0, GROUP)
    ROW: tl.constexpr = (K + 4 * GROUP - 1) // (4 * GROUP) * GROUP
    at = weight + n[:, None].to(tl.int64) * ROW + chunk * GROUP + j[None, :]
    words = tl.load(at, mask=is_row[:, None], other=0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for i in tl.static_range(4):
        group = chunk * 4 + i
        groups = tl.load(scale + (chunk * N + n) * 4 + i, mask=is_row, other=0)
        values = int4_values(words, groups, i, FORMAT)
        k = group * GROUP + j
        tl.store(
            out + n[:, None].to(tl.int64) * K + k[None, :], values,
            mask=is_row[:, None] & (k < K)[None, :],
        )  # fmt: skip
