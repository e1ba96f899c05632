"""int4 linears for many tokens where tensor cores take a warp group's operand from registers (`wgmma`).

Four warps copy: every step's words, scales and columns of x, a few steps ahead, to a ring in shared memory. Eight
multiply: they widen words to the left operand in registers while the tensor cores multiply what came before. The two
meet at barriers of each place of the ring: `full`, and `empty` again.
Source: NVIDIA, PTX ISA, wgmma and mbarrier; what CUTLASS calls mixed input GEMM.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.linear import triton_widen

int4_bf16 = gluon.jit(triton_widen.int4_bf16.fn)


@gluon.jit
def _copy(
    words, groups, values, full, empty, x, weight, scale, num_tokens, first_n, first_token, begin,
    N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, PART: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """Fills the ring. A place is told full once its copies have landed: AHEAD steps after they were asked for."""
    WARPS: gl.constexpr = gl.num_warps()
    ROW: gl.constexpr = (K + 4 * GROUP - 1) // (4 * GROUP) * GROUP
    PER: gl.constexpr = GROUP // PART
    # One less than there are places that wait: the place before is empty only after the next step has begun.
    AHEAD: gl.constexpr = STAGES - 2
    OF_ROW: gl.constexpr = PART // 8
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [32 // OF_ROW, OF_ROW], [WARPS, 1], [1, 0])
    BY_ROW: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [WARPS, 1], [1, 0])
    k = gl.arange(0, PART, gl.SliceLayout(0, COPY))[None, :]
    n = gl.minimum(first_n + gl.arange(0, BLOCK_N, gl.SliceLayout(1, COPY)), N - 1)
    words_at = weight + (n.to(gl.int64)[:, None] * ROW + k)
    n = gl.minimum(first_n + gl.arange(0, BLOCK_N, gl.SliceLayout(1, BY_ROW)), N - 1)
    groups_at = scale + (n[:, None] * 4 + gl.arange(0, 4, gl.SliceLayout(0, BY_ROW))[None, :])
    line = gl.arange(0, 4 * BLOCK_M, gl.SliceLayout(1, COPY))[:, None]
    token = first_token + line % BLOCK_M
    column = line // BLOCK_M * GROUP + k
    values_at = x + token.to(gl.int64) * K + column
    is_token = token < num_tokens
    if PDL:
        gdc_wait()
    for step in range(STEPS + AHEAD):
        if step < STEPS:
            place = step % STAGES
            mbarrier.wait(empty.index(place), (step // STAGES + 1) & 1)
            chunk, inside = (begin + step) // PER, (begin + step) % PER * PART
            here = words_at + (begin + step) * PART
            async_copy.async_copy_global_to_shared(words.index(place), here)
            here = groups_at + chunk * (N * 4)
            async_copy.async_copy_global_to_shared(groups.index(place), here)
            start = chunk * (4 * GROUP) + inside
            is_value = is_token
            if K % (4 * GROUP) != 0:
                is_value = is_value & (start + column < K)
            async_copy.async_copy_global_to_shared(
                values.index(place), values_at + start, mask=is_value
            )
        async_copy.commit_group()
        if step >= AHEAD:
            async_copy.wait_group(AHEAD)
            fence_async_shared()
            gl.barrier()
            mbarrier.arrive(full.index((step - AHEAD) % STAGES), count=1)


@gluon.jit
def _multiply(
    words, groups, values, full, empty, acc,
    BLOCK_M: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """The sums over all steps. Words are widened while the part before is multiplied."""
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    for step in range(STEPS):
        place = step % STAGES
        mbarrier.wait(full.index(place), step // STAGES & 1)
        tile = words.index(place).load(LEFT)
        for i in gl.static_range(4):
            left = int4_bf16(tile, groups.index(place).slice(i, 1, dim=1).load(LEFT), i)
            right = values.index(place).slice(i * BLOCK_M, BLOCK_M, dim=0).permute([1, 0])
            acc = warpgroup_mma(left, right, acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            if i == 0:  # nothing reads the place before any more
                before = (step + STAGES - 1) % STAGES
                mbarrier.arrive(empty.index(before), count=1, pred=step > 0)
    return warpgroup_mma_wait(0, deps=[acc])


@gluon.jit
def linear_many_int4(
    x, weight, scale, bias, out, partial, counters, num_tokens,
    N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, PART: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, SPLIT_K: gl.constexpr, STAGES: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """BLOCK_N rows of the weight times BLOCK_M tokens; a step is PART columns of each of a chunk's four groups.

    The grid: blocks of tokens, blocks of rows, parts of K. SPLIT_K, `partial` and `counters` as in `linear_few`; it
    divides the number of steps.
    """
    WARPS: gl.constexpr = gl.num_warps()
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M, 16])
    STEPS: gl.constexpr = (K + 4 * GROUP - 1) // (4 * GROUP) * GROUP // PART // SPLIT_K
    WORDS: gl.constexpr = gl.SwizzledSharedLayout(8, 64 // PART, PART // 8, [1, 0])
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    VALUES: gl.constexpr = gl.NVMMASharedLayout(2 * PART, 16, 2)
    if PDL:
        gdc_launch_dependents()
    words = gl.allocate_shared_memory(gl.int16, [STAGES, BLOCK_N, PART], WORDS)
    groups = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK_N, 4], FLAT)
    values = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 4 * BLOCK_M, PART], VALUES)
    full = mbarrier.allocate_mbarrier(batch=STAGES)
    empty = mbarrier.allocate_mbarrier(batch=STAGES)
    for place in gl.static_range(STAGES):
        mbarrier.init(full.index(place), count=1)
        mbarrier.init(empty.index(place), count=1)
    # Tokens first: programs that run together share weights, which one of them brings from memory.
    first_token = gl.program_id(0) * BLOCK_M
    first_n = gl.program_id(1) * BLOCK_N
    begin = gl.program_id(2) * STEPS
    acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, MMA)
    acc = gl.warp_specialize(
        [
            (_multiply, (words, groups, values, full, empty, acc, BLOCK_M, STEPS, STAGES, MMA)),
            (
                _copy,
                (
                    words, groups, values, full, empty, x, weight, scale, num_tokens, first_n,
                    first_token, begin, N, K, GROUP, PART, BLOCK_M, BLOCK_N, STEPS, STAGES, PDL,
                ),
            ),
        ],
        [4],
        [40],
    )  # fmt: skip
    rows = gl.arange(0, BLOCK_N, gl.SliceLayout(1, MMA))
    if SPLIT_K > 1:
        STRIDE: gl.constexpr = BLOCK_N * BLOCK_M
        tile_id = gl.program_id(1) * gl.num_programs(0) + gl.program_id(0)
        base = tile_id.to(gl.int64) * SPLIT_K
        at = rows[:, None] * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(0, MMA))[None, :]
        gl.store(partial + (base + gl.program_id(2)) * STRIDE + at, acc)
        gl.barrier()  # all of this program's stores come before its count
        if gl.atomic_add(counters + tile_id, 1, sem="acq_rel") < SPLIT_K - 1:
            return
        gl.store(counters + tile_id, 0)
        acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, MMA)
        for s in gl.static_range(SPLIT_K):
            acc += gl.load(partial + (base + s) * STRIDE + at, cache_modifier=".cg")
    if bias is not None:
        acc += gl.load(bias + gl.minimum(first_n + rows, N - 1)).to(gl.float32)[:, None]
    # Through shared memory, so that neighbours store neighbouring outputs of one token.
    LANES: gl.constexpr = BLOCK_N // 8
    STORE: gl.constexpr = gl.BlockedLayout([8, 1], [LANES, 32 // LANES], [1, WARPS], [0, 1])
    STAGED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2, transposed=True)
    staged = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_N, BLOCK_M], STAGED)
    staged.store(acc.to(gl.bfloat16))
    result = staged.load(STORE)
    n = first_n + gl.arange(0, BLOCK_N, gl.SliceLayout(1, STORE))
    token = first_token + gl.arange(0, BLOCK_M, gl.SliceLayout(0, STORE))
    is_valid = (n < N)[:, None] & (token < num_tokens)[None, :]
    gl.store(out + token.to(gl.int64)[None, :] * N + n[:, None], result, mask=is_valid)
