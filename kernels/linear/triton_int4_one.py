"""int4 linears for one token by tensor cores: weights go from memory to registers in the order that mma reads."""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.linear import triton_epilogue, triton_widen

int4_bf16 = gluon.jit(triton_widen.int4_bf16.fn)
row_pair = gluon.jit(triton_epilogue.row_pair.fn)
load_sum = gluon.jit(triton_epilogue.load_sum.fn)
finish = gluon.jit(triton_epilogue.finish.fn)


@gluon.jit
def _words_and_groups(
    words_at, groups_at, n, c, N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """One chunk's words of rows `n`, and the scales and zeros of its four groups."""
    WARPS: gl.constexpr = gl.num_warps()
    ROW: gl.constexpr = (K + 4 * GROUP - 1) // (4 * GROUP) * GROUP
    words = gl.load(words_at + (c * WARPS * GROUP + n.to(gl.int64) * ROW))
    here = groups_at + (c * WARPS * N + n) * 4
    return words, gl.load(here), gl.load(here + 1), gl.load(here + 2), gl.load(here + 3)


@gluon.jit
def linear_one_int4_mma(
    x, weight, scale, bias, squares, rows, residual, gain, out, normed, squares_out,
    positions, rope, slots, k_cache, v_cache,
    N: gl.constexpr, K: gl.constexpr, EPS: gl.constexpr, NUM_SQUARES: gl.constexpr,
    EPILOGUE: gl.constexpr, NUM_HEADS: gl.constexpr, NUM_KV_HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr, BLOCK_TOKENS: gl.constexpr, FORMAT: gl.constexpr, GROUP: gl.constexpr,
    BLOCK_N: gl.constexpr, PREFETCH: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """`linear_one` for int4: each warp multiplies BLOCK_N rows of every WARPS-th chunk of K."""
    WARPS: gl.constexpr = gl.num_warps()
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 8)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, MMA, 8)
    OUT: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [WARPS, 1], [1, 0])
    CHUNKS: gl.constexpr = (K + 4 * GROUP - 1) // (4 * GROUP)
    ROUNDS: gl.constexpr = (CHUNKS + WARPS - 1) // WARPS
    PAIRED: gl.constexpr = EPILOGUE != "plain"
    OUTPUTS: gl.constexpr = N // 2 if PAIRED else N
    if PDL:
        gdc_launch_dependents()
    left_row: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, LEFT))
    left_k: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, LEFT))
    left_w: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, LEFT))
    right_k: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, RIGHT))
    right_w: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, RIGHT))
    right_n: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, RIGHT))
    index = gl.program_id(0) * BLOCK_N + gl.arange(0, BLOCK_N, left_row)
    if OUTPUTS % BLOCK_N != 0:
        index = gl.minimum(index, OUTPUTS - 1)
    n, n_second = row_pair(index, EPILOGUE, N, HEAD_DIM)
    n = n[None, :, None]
    n_second = n_second[None, :, None]
    warp = gl.arange(0, WARPS, left_w)[:, None, None]
    j = gl.arange(0, GROUP, left_k)[None, None, :]
    words_at = weight + (warp * GROUP + j)
    groups_at = scale + warp * (N * 4)
    early = ()
    early_second = ()
    for c in gl.static_range(PREFETCH):
        early += (_words_and_groups(words_at, groups_at, n, c, N, K, GROUP),)  # type: ignore[assignment]
        if PAIRED:
            tile = _words_and_groups(words_at, groups_at, n_second, c, N, K, GROUP)
            early_second += (tile,)  # type: ignore[assignment]
    if PDL:
        gdc_wait()
    source = 0
    if rows is not None:
        source = gl.load(rows)
        x += source.to(gl.int64) * K
    if squares is not None:
        FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
        part = gl.arange(0, triton.next_power_of_2(NUM_SQUARES), FLAT)
        parts = gl.load(squares + source * NUM_SQUARES + part, mask=part < NUM_SQUARES, other=0)
    k = gl.arange(0, WARPS, right_w)[:, None, None] * (4 * GROUP)
    k = k + gl.arange(0, GROUP, right_k)[None, :, None]
    k = k + gl.arange(0, 8, right_n)[None, None, :] * 0
    acc = gl.zeros([WARPS, BLOCK_N, 8], gl.float32, MMA)
    acc_second = acc
    for c in gl.static_range(ROUNDS):
        if c < PREFETCH:
            tile = early[c]
        else:
            tile = _words_and_groups(words_at, groups_at, n, c, N, K, GROUP)
        if PAIRED:
            if c < PREFETCH:
                tile_second = early_second[c]  # type: ignore[var-annotated]
            else:
                tile_second = _words_and_groups(words_at, groups_at, n_second, c, N, K, GROUP)
        for i in gl.static_range(4):
            here = k + (c * WARPS * 4 + i) * GROUP
            if K % (4 * GROUP) == 0:
                right = gl.load(x + here)
            else:
                right = gl.load(x + here, mask=here < K, other=0)
            acc = mma_v2(int4_bf16(tile[0], tile[1 + i], i), right, acc)
            if PAIRED:
                left = int4_bf16(tile_second[0], tile_second[1 + i], i)
                acc_second = mma_v2(left, right, acc_second)
    out_row: gl.constexpr = gl.SliceLayout(1, OUT)
    first = gl.convert_layout(gl.sum(gl.sum(acc, 2), 0) * 0.125, out_row)[:, None]
    second = first
    if PAIRED:
        second = gl.convert_layout(gl.sum(gl.sum(acc_second, 2), 0) * 0.125, out_row)[:, None]
    if squares is not None:
        rstd = 1 / gl.sqrt(gl.sum(parts, 0) / K + EPS)
        first *= rstd
        second *= rstd
    index = gl.program_id(0) * BLOCK_N + gl.arange(0, BLOCK_N, out_row)
    n, n_second = row_pair(index, EPILOGUE, N, HEAD_DIM)
    token = gl.arange(0, 1, gl.SliceLayout(0, OUT))
    gl.static_assert(EPILOGUE != "rope")  # nobody loads its angles here
    residual_tile, gains = load_sum(index, n, token, 1, residual, gain, N)
    finish(
        first, second, index, n, n_second, token, 1, None, bias, residual_tile, gains,
        0.0, 0.0, 0, out, normed, squares_out, k_cache, v_cache,
        N, EPILOGUE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_TOKENS,
    )  # fmt: skip
