"""int4 linears for many tokens where tensor cores take a warp group's operand from registers (`wgmma`).

One warp asks the copy engine for boxes (TMA), some parts ahead, into rings in shared memory: words with their scales,
and columns of x. Eight multiply: they widen words to the left operand in registers while the tensor cores multiply
what came before. The two meet at barriers of each place of the rings: `full`, and `empty` again.
Source: NVIDIA, PTX ISA, wgmma, cp.async.bulk.tensor and mbarrier; what CUTLASS calls mixed input GEMM.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.linear import triton_widen

int4_bf16 = gluon.jit(triton_widen.int4_bf16.fn)


@gluon.jit
def _copy(
    words, groups, values, words_full, words_empty, full, empty, x, weight, scale, first_n,
    first_token, begin,
    N: gl.constexpr, GROUP: gl.constexpr, PART: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """Fills the rings: words of a step, then the four parts of x that they are multiplied by."""
    PER: gl.constexpr = GROUP // PART
    if PDL:
        gdc_wait()
    for step in range(STEPS):
        place, at = step % 2, begin + step
        chunk, inside = at // PER, at % PER * PART
        mbarrier.wait(words_empty.index(place), (step // 2 + 1) & 1)
        is_full = words_full.index(place)
        mbarrier.expect(is_full, BLOCK_N * (2 * PART + 4 * 4))
        tma.async_copy_global_to_shared(weight, [first_n, at * PART], is_full, words.index(place))
        row = chunk * N + first_n
        tma.async_copy_global_to_shared(scale, [row, 0], is_full, groups.index(place))
        for i in gl.static_range(4):
            count = step * 4 + i
            place = count % STAGES
            mbarrier.wait(empty.index(place), (count // STAGES + 1) & 1)
            is_full = full.index(place)
            mbarrier.expect(is_full, 2 * BLOCK_M * PART)
            column = (chunk * 4 + i) * GROUP + inside
            tma.async_copy_global_to_shared(x, [first_token, column], is_full, values.index(place))


@gluon.jit
def _multiply(
    words, groups, values, words_full, words_empty, full, empty, acc,
    BLOCK_N: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """The sums over all steps. Words are widened while the part before is multiplied."""
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    # A row's four groups in the thread that widens its words.
    GROUPS: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 2], [0, 1], [8, 0]],
        [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0], [64, 0]],
        [],
        [BLOCK_N, 4],
    )
    for step in range(STEPS):
        place = step % 2
        mbarrier.wait(words_full.index(place), step // 2 & 1)
        tile = words.index(place).load(LEFT)
        pairs = groups.index(place).load(GROUPS).reshape([BLOCK_N, 2, 2])
        even, odd = gl.split(pairs)
        first, third = gl.split(even)
        second, fourth = gl.split(odd)
        of_part = (first, second, third, fourth)
        for i in gl.static_range(4):
            count = step * 4 + i
            here = count % STAGES
            group = gl.convert_layout(of_part[i], gl.SliceLayout(1, LEFT), assert_trivial=True)
            left = int4_bf16(tile, group[:, None], i)
            mbarrier.wait(full.index(here), count // STAGES & 1)
            right = values.index(here).permute([1, 0])
            acc = warpgroup_mma(left, right, acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            # Nothing reads the place before any more. Words are in registers since the first part was widened.
            before = (count + STAGES - 1) % STAGES
            mbarrier.arrive(empty.index(before), count=1, pred=count > 0)
            if i == 1:
                mbarrier.arrive(words_empty.index(place), count=1)
    return warpgroup_mma_wait(0, deps=[acc])


@gluon.jit
def _tile(
    tile, num_tokens, N: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """The first token and the first row of a tile. Eight blocks of tokens first: tiles that are multiplied
    together share weights, which one of them brings from memory, and read a part of a long x alone."""
    TOGETHER: gl.constexpr = 8
    OF_GROUP: gl.constexpr = TOGETHER * ((N + BLOCK_N - 1) // BLOCK_N)
    blocks = (num_tokens + BLOCK_M - 1) // BLOCK_M
    before = tile // OF_GROUP * TOGETHER
    together = gl.minimum(blocks - before, TOGETHER)
    inside = tile % OF_GROUP
    return (before + inside % together) * BLOCK_M, inside // together * BLOCK_N


@gluon.jit
def linear_many_int4(
    x, weight, scale, bias, out, partial, counters, num_tokens,
    N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, PART: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, SPLIT_K: gl.constexpr, STAGES: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """BLOCK_N rows of the weight times BLOCK_M tokens; a step is PART columns of each of a chunk's four groups.

    `x`, `weight` and `scale` come as boxes: PART columns of BLOCK_M tokens and of BLOCK_N rows, and the four groups of
    BLOCK_N rows. The grid: tiles, parts of K. SPLIT_K, `partial` and `counters` as in
    `linear_few`; it divides the number of steps. STAGES are places of x's ring; words have two.
    """
    WARPS: gl.constexpr = gl.num_warps()
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M, 16])
    STEPS: gl.constexpr = (K + 4 * GROUP - 1) // (4 * GROUP) * GROUP // PART // SPLIT_K
    if PDL:
        gdc_launch_dependents()
    words = gl.allocate_shared_memory(gl.int16, [2, BLOCK_N, PART], weight.layout)
    groups = gl.allocate_shared_memory(gl.int32, [2, BLOCK_N, 4], scale.layout)
    values = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_M, PART], x.layout)
    words_full = mbarrier.allocate_mbarrier(batch=2)
    words_empty = mbarrier.allocate_mbarrier(batch=2)
    for place in gl.static_range(2):
        mbarrier.init(words_full.index(place), count=1)
        mbarrier.init(words_empty.index(place), count=1)
    full = mbarrier.allocate_mbarrier(batch=STAGES)
    empty = mbarrier.allocate_mbarrier(batch=STAGES)
    for place in gl.static_range(STAGES):
        mbarrier.init(full.index(place), count=1)
        mbarrier.init(empty.index(place), count=1)
    fence_async_shared()  # the copy engine sees the barriers
    first_token, first_n = _tile(gl.program_id(0), num_tokens, N, BLOCK_M, BLOCK_N)
    begin = gl.program_id(1) * STEPS
    acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, MMA)
    acc = gl.warp_specialize(
        [
            (
                _multiply,
                (
                    words, groups, values, words_full, words_empty, full, empty, acc, BLOCK_N,
                    STEPS, STAGES, MMA,
                ),
            ),
            (
                _copy,
                (
                    words, groups, values, words_full, words_empty, full, empty, x, weight, scale,
                    first_n, first_token, begin, N, GROUP, PART, BLOCK_M, BLOCK_N, STEPS, STAGES,
                    PDL,
                ),
            ),
        ],
        [1],
        [24],
    )  # fmt: skip
    rows = gl.arange(0, BLOCK_N, gl.SliceLayout(1, MMA))
    if SPLIT_K > 1:
        STRIDE: gl.constexpr = BLOCK_N * BLOCK_M
        base = gl.program_id(0).to(gl.int64) * SPLIT_K
        at = rows[:, None] * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(0, MMA))[None, :]
        gl.store(partial + (base + gl.program_id(1)) * STRIDE + at, acc)
        gl.barrier()  # all of this program's stores come before its count
        if gl.atomic_add(counters + gl.program_id(0), 1, sem="acq_rel") < SPLIT_K - 1:
            return
        gl.store(counters + gl.program_id(0), 0)
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
