"""int4 linears for one token by tensor cores, out of a ring in shared memory.

A program's first words are asked for before the wait for the kernel before, and take no registers. tiles.py keeps rings
small, so that programs of both kernels fit a multiprocessor together and memory stays busy across the border.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.linear import triton_epilogue, triton_widen

int4_bf16 = gluon.jit(triton_widen.int4_bf16.fn)
row_pair = gluon.jit(triton_epilogue.row_pair.fn)
load_sum = gluon.jit(triton_epilogue.load_sum.fn)
load_turns = gluon.jit(triton_epilogue.load_turns.fn)
finish = gluon.jit(triton_epilogue.finish.fn)


@gluon.jit
def _weight_rows(
    r, BLOCK_N: gl.constexpr, N: gl.constexpr, EPILOGUE: gl.constexpr, HEAD_DIM: gl.constexpr,
):  # fmt: skip
    """The rows of the weight that a tile's rows `r` are: those of this program's outputs, then those they pair with."""
    OUTPUTS: gl.constexpr = N if EPILOGUE == "plain" else N // 2
    index = gl.program_id(0) * BLOCK_N + r % BLOCK_N
    if OUTPUTS % BLOCK_N != 0:
        index = gl.minimum(index, OUTPUTS - 1)
    n, n_second = row_pair(index, EPILOGUE, N, HEAD_DIM)
    if EPILOGUE != "plain":
        n = gl.where(r < BLOCK_N, n, n_second)
    return n


@gluon.jit
def _copy_values(
    place, values_at, column, step, K: gl.constexpr, OF_STEP: gl.constexpr,
):  # fmt: skip
    """A step's columns of x."""
    here = values_at + step * OF_STEP
    if K % OF_STEP == 0:
        async_copy.async_copy_global_to_shared(place, here)
    else:
        async_copy.async_copy_global_to_shared(place, here, mask=column + step * OF_STEP < K)


@gluon.jit
def linear_one_int4_mma(
    x, weight, scale, bias, squares, rows, residual, gain, out, normed, squares_out,
    positions, rope, slots, k_cache, v_cache,
    N: gl.constexpr, K: gl.constexpr, EPS: gl.constexpr, NUM_SQUARES: gl.constexpr,
    EPILOGUE: gl.constexpr, NUM_HEADS: gl.constexpr, NUM_KV_HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr, BLOCK_TOKENS: gl.constexpr, FORMAT: gl.constexpr, GROUP: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """`linear_one` for int4: a step is a chunk of K for each warp. Outputs that pair rows have both in one tile."""
    WARPS: gl.constexpr = gl.num_warps()
    PAIRED: gl.constexpr = EPILOGUE != "plain"
    ROWS: gl.constexpr = 2 * BLOCK_N if PAIRED else BLOCK_N
    CHUNKS: gl.constexpr = (K + 4 * GROUP - 1) // (4 * GROUP)
    STEPS: gl.constexpr = CHUNKS // WARPS
    ROW: gl.constexpr = CHUNKS * GROUP
    OF_STEP: gl.constexpr = WARPS * 4 * GROUP
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 8)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, MMA, 8)
    OF_ROW: gl.constexpr = GROUP // 8
    BY_WORD: gl.constexpr = gl.BlockedLayout(
        [1, 1, 8], [1, 32 // OF_ROW, OF_ROW], [WARPS, 1, 1], [2, 1, 0]
    )
    BY_GROUP: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 32, 1], [WARPS, 1, 1], [2, 1, 0])
    BY_VALUE: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [WARPS, 1], [1, 0])
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    OUT: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [WARPS, 1], [1, 0])
    SWIZZLED: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [2, 1, 0])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    PLAIN_X: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    if PDL:
        gdc_launch_dependents()
    words = gl.allocate_shared_memory(gl.int16, [STAGES, WARPS, ROWS, GROUP], SWIZZLED)
    groups = gl.allocate_shared_memory(gl.int32, [STAGES, WARPS, ROWS, 4], PLAIN)
    values = gl.allocate_shared_memory(gl.bfloat16, [STAGES, WARPS, 4 * GROUP], PLAIN_X)

    r = gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(2, BY_WORD)))
    n = _weight_rows(r, BLOCK_N, N, EPILOGUE, HEAD_DIM).to(gl.int64)[None, :, None]
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, BY_WORD)))[:, None, None]
    j = gl.arange(0, GROUP, gl.SliceLayout(0, gl.SliceLayout(1, BY_WORD)))[None, None, :]
    words_at = weight + (n * ROW + warp * GROUP + j)
    r = gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(2, BY_GROUP)))
    n = _weight_rows(r, BLOCK_N, N, EPILOGUE, HEAD_DIM)[None, :, None]
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, BY_GROUP)))[:, None, None]
    four = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, BY_GROUP)))[None, None, :]
    groups_at = scale + (warp * (N * 4) + n * 4 + four)
    for s in gl.static_range(STAGES):
        here = words_at + s * (WARPS * GROUP)
        async_copy.async_copy_global_to_shared(words.index(s), here)
        here = groups_at + s * (WARPS * N * 4)
        async_copy.async_copy_global_to_shared(groups.index(s), here)
        async_copy.commit_group()
    index = gl.program_id(0) * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(1, OUT))
    OUTPUTS: gl.constexpr = N // 2 if PAIRED else N
    n, n_second = row_pair(gl.minimum(index, OUTPUTS - 1), EPILOGUE, N, HEAD_DIM)
    token = gl.arange(0, 1, gl.SliceLayout(0, OUT))
    cos, sin, slot = load_turns(n, token, token == 0, positions, rope, slots, EPILOGUE, HEAD_DIM)
    if PDL:
        gdc_wait()
    source = 0
    if rows is not None:
        source = gl.load(rows)
        x += source.to(gl.int64) * K
    if squares is not None:
        part = gl.arange(0, triton.next_power_of_2(NUM_SQUARES), FLAT)
        parts = gl.load(squares + source * NUM_SQUARES + part, mask=part < NUM_SQUARES, other=0)
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, BY_VALUE))[:, None]
    column = warp * (4 * GROUP) + gl.arange(0, 4 * GROUP, gl.SliceLayout(0, BY_VALUE))[None, :]
    values_at = x + column
    for s in gl.static_range(STAGES):
        _copy_values(values.index(s), values_at, column, s, K, OF_STEP)
        async_copy.commit_group()
    residual_tile, gains = load_sum(index, n, token, 1, residual, gain, N)
    # A sum for each part of a chunk: none waits for the product before.
    zero = gl.zeros([WARPS, ROWS, 8], gl.float32, MMA)
    sums = (zero, zero, zero, zero)
    for step in range(STEPS):
        place = step % STAGES
        async_copy.wait_group(STAGES - 1)
        tile = words.index(place).load(LEFT)
        added = ()
        for i in gl.static_range(4):
            left = int4_bf16(tile, groups.index(place).slice(i, 1, dim=2).load(LEFT), i)
            of_part = values.index(place).slice(i * GROUP, GROUP, dim=1)
            right = of_part.load(gl.SliceLayout(2, RIGHT))[:, :, None]
            right = right.broadcast_to([WARPS, GROUP, 8])
            added += (mma_v2(left, right, sums[i]),)  # type: ignore[assignment]
        sums = added  # type: ignore[assignment]
        if STEPS > STAGES:
            after = step + STAGES
            if after < STEPS:
                here = words_at + after * (WARPS * GROUP)
                async_copy.async_copy_global_to_shared(words.index(place), here)
                here = groups_at + after * (WARPS * N * 4)
                async_copy.async_copy_global_to_shared(groups.index(place), here)
                _copy_values(values.index(place), values_at, column, after, K, OF_STEP)
        async_copy.commit_group()  # one a step, so that the wait counts the same in each
    # All eight columns are the token's.
    total = gl.sum(gl.sum((sums[0] + sums[1]) + (sums[2] + sums[3]), 2), 0) * 0.125
    if PAIRED:
        PAIRS: gl.constexpr = gl.BlockedLayout([1, 2], [32, 1], [WARPS, 1], [1, 0])
        pairs = gl.permute(gl.reshape(total, [2, BLOCK_N]), [1, 0])
        first, second = gl.split(gl.convert_layout(pairs, PAIRS))
        first = gl.convert_layout(first, gl.SliceLayout(1, OUT))[:, None]
        second = gl.convert_layout(second, gl.SliceLayout(1, OUT))[:, None]
    else:
        first = gl.convert_layout(total, gl.SliceLayout(1, OUT))[:, None]
        second = first
    if squares is not None:
        rstd = 1 / gl.sqrt(gl.sum(parts, 0) / K + EPS)
        first *= rstd
        second *= rstd
    finish(
        first, second, index, n, n_second, token, 1, None, bias, residual_tile, gains,
        cos, sin, slot, out, normed, squares_out, k_cache, v_cache,
        N, EPILOGUE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_TOKENS,
    )  # fmt: skip
