"""What the linear kernels share: which rows make an output, and what is done with sums before they are stored."""

import triton
import triton.language as tl


@triton.jit
def load_tile(pointers, k, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile whose last dim runs over k; masked only where BLOCK_K does not divide K."""
    if K % BLOCK_K == 0:
        return tl.load(pointers)
    return tl.load(pointers, mask=k < K, other=0.0)


@triton.jit
def row_pair(index, EPILOGUE: tl.constexpr, N: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The weight rows that output `index` is made of; both the same where one is enough."""
    if EPILOGUE == "silu_mul":
        return index, index + N // 2
    if EPILOGUE == "rope":
        HALF: tl.constexpr = HEAD_DIM // 2
        first = (index // HALF) * HEAD_DIM + index % HALF
        return first, first + HALF
    return index, index


@triton.jit
def scaled(acc, n, scale, bias):
    """Column scale, then bias; n broadcasts over tokens."""
    if scale is not None:
        acc *= tl.load(scale + n)[:, None]
    if bias is not None:
        acc += tl.load(bias + n)[:, None].to(tl.float32)
    return acc


@triton.jit
def load_turns(
    n, tokens, is_token, positions, rope, slots, EPILOGUE: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """cos and sin that RoPE turns rows by, and the tokens' KV slots. None of a step's kernels writes what they come
    from: they may be loaded before the wait.

    `rope` is [positions, cos of HEAD_DIM / 2 then sin]. A slot below 0 is padding.
    """
    cos, sin, slot = 0.0, 0.0, 0
    if EPILOGUE == "rope":
        position = tl.load(positions + tokens, mask=is_token, other=0).to(tl.int64)
        slot = tl.load(slots + tokens, mask=is_token, other=-1).to(tl.int64)
        angle = rope + position[None, :] * HEAD_DIM + (n % HEAD_DIM)[:, None]
        cos = tl.load(angle)
        sin = tl.load(angle + HEAD_DIM // 2)
    return cos, sin, slot


@triton.jit
def load_sum(index, n, tokens, num_tokens, residual, gain, N: tl.constexpr):
    """What a plain epilogue adds to outputs `index`, and the gains that it multiplies by; 0 where there are none."""
    value, gains = 0.0, 0.0
    if residual is not None:
        is_valid = (index < N)[:, None] & (tokens < num_tokens)[None, :]
        at = residual + tokens[None, :].to(tl.int64) * N + n[:, None]
        value = tl.load(at, mask=is_valid, other=0).to(tl.float32)
    if gain is not None:
        gains = tl.load(gain + n)[:, None].to(tl.float32)
    return value, gains


@triton.jit
def _store_plain(acc, n, tokens, is_valid, gains, out, normed, squares_out, N: tl.constexpr):
    at = tokens[None, :].to(tl.int64) * N + n[:, None]
    rounded = acc.to(out.dtype.element_ty)
    tl.store(out + at, rounded, mask=is_valid)
    if normed is not None:
        h = tl.where(is_valid, rounded.to(tl.float32), 0.0)
        tl.store(normed + at, (h * gains).to(normed.dtype.element_ty), mask=is_valid)
        part = squares_out + tokens.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
        tl.store(part, tl.sum(h * h, 0), mask=tl.max(is_valid.to(tl.int32), 0) > 0)


@triton.jit
def load_squares(squares, source, is_token, NUM_SQUARES: tl.constexpr):
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
    first, second, n, tokens, is_valid, cos, sin, slot, out, k_cache, v_cache,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """A slot below 0 is padding: not written."""
    HALF: tl.constexpr = HEAD_DIM // 2
    Q: tl.constexpr = NUM_HEADS * HEAD_DIM
    KV: tl.constexpr = NUM_KV_HEADS * HEAD_DIM
    is_q = is_valid & (n < Q)[:, None]
    is_k = is_valid & ((n >= Q) & (n < Q + KV))[:, None] & (slot >= 0)[None, :]
    is_v = is_valid & (n >= Q + KV)[:, None] & (slot >= 0)[None, :]
    low = first * cos - second * sin
    high = second * cos + first * sin
    at = out + tokens[None, :].to(tl.int64) * Q + n[:, None]
    tl.store(at, low.to(out.dtype.element_ty), mask=is_q)
    tl.store(at + HALF, high.to(out.dtype.element_ty), mask=is_q)
    # In a block the tokens of a head follow each other.
    token_at = slot // BLOCK_TOKENS * (BLOCK_TOKENS * KV) + slot % BLOCK_TOKENS * HEAD_DIM
    head_at = n // HEAD_DIM * (BLOCK_TOKENS * HEAD_DIM) + n % HEAD_DIM
    at = k_cache + token_at[None, :] + (head_at - BLOCK_TOKENS * Q)[:, None]
    tl.store(at, low.to(k_cache.dtype.element_ty), mask=is_k)
    tl.store(at + HALF, high.to(k_cache.dtype.element_ty), mask=is_k)
    at = v_cache + token_at[None, :] + (head_at - BLOCK_TOKENS * (Q + KV))[:, None]
    tl.store(at, first.to(v_cache.dtype.element_ty), mask=is_v)
    tl.store(at + HALF, second.to(v_cache.dtype.element_ty), mask=is_v)


@triton.jit
def finish(
    first, second, index, n, n_second, tokens, num_tokens, scale, bias, residual_tile, gains,
    cos, sin, slot, out, normed, squares_out, k_cache, v_cache,
    N: tl.constexpr, EPILOGUE: tl.constexpr,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """Column scale and bias, then what the epilogue does with sums of the rows `n` and `n_second`, stored.

    `residual_tile` and `gains` are `load_sum`'s, `cos`, `sin` and `slot` are `load_turns`'.
    """
    OUTPUTS: tl.constexpr = N if EPILOGUE == "plain" else N // 2
    is_valid = (index < OUTPUTS)[:, None] & (tokens < num_tokens)[None, :]
    first = scaled(first, n, scale, bias)
    if EPILOGUE == "plain":
        first += residual_tile
        _store_plain(first, n, tokens, is_valid, gains, out, normed, squares_out, N)
    else:
        second = scaled(second, n_second, scale, bias)
        if EPILOGUE == "silu_mul":
            value = first * tl.sigmoid(first) * second
            _store_plain(value, n, tokens, is_valid, 0.0, out, None, None, N // 2)
        else:
            _store_rope(
                first, second, n, tokens, is_valid, cos, sin, slot, out, k_cache, v_cache,
                NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_TOKENS,
            )  # fmt: skip
