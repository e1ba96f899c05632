"""Attention launches over random paged caches, compared with the formula: on the CPU through the interpreter, on a
GPU from machine code."""

import numpy as np
import torch

from kernels.attention.launch import AttentionShape, AttentionTiles, grid, scratch, variant
from kernels.attention.shares import Shares
from kernels.kv_cache import read, write
from kernels.launch import Sizes
from shared.arch import Arch
from tests.kernels.linear_cases import TORCH_DTYPES, Operands, Run

BLOCK_TOKENS = 4
_KV_DTYPES = {**TORCH_DTYPES, "fp8e4nv": torch.float8_e4m3fn, "i8": torch.int8}


def attend(
    q_THD: torch.Tensor, k_NKD: torch.Tensor, v_NKD: torch.Tensor, shape: AttentionShape
) -> torch.Tensor:
    """One sequence's attention, written plainly: its last T of N positions are the queries."""
    length, num_queries = k_NKD.shape[0], q_THD.shape[0]
    k = k_NKD.repeat_interleave(shape.group, 1).float()
    v = v_NKD.repeat_interleave(shape.group, 1).float()
    scores = torch.einsum("thd,nhd->htn", q_THD.float(), k) * shape.scale
    if shape.soft_cap:
        scores = shape.soft_cap * torch.tanh(scores / shape.soft_cap)
    key, query = torch.arange(length), torch.arange(length - num_queries, length)[:, None]
    hidden = key > query
    if shape.window:
        hidden = hidden | (key <= query - shape.window)
    scores = scores.masked_fill(hidden, float("-inf"))
    return torch.einsum("htn,nhd->thd", scores.softmax(-1), v)


def check_attention(
    run: Run, arch: Arch, shape: AttentionShape, tiles: AttentionTiles,
    lengths: list[tuple[int, int]], seed: int, device: str = "cpu",
    others: tuple[AttentionTiles, ...] = (), shares: Shares | None = None,
) -> None:  # fmt: skip
    """Runs one launch, and `others` for the sequences that it does not take, and compares every query. `lengths`:
    (queries, tokens) of each sequence. `shares`: as parts are dealt out; else as many as the launch takes."""
    torch.set_default_device(device)
    try:
        dealt = shares or Shares(max(tiles.extra, 1), tiles.block_q)
        _launch_and_compare(run, arch, shape, (tiles, *others), lengths, seed, dealt)
    finally:
        torch.set_default_device("cpu")


def _launch_and_compare(
    run: Run, arch: Arch, shape: AttentionShape, launches: tuple[AttentionTiles, ...],
    lengths: list[tuple[int, int]], seed: int, shares: Shares,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    dtype = TORCH_DTYPES[shape.dtype]
    num_tokens, num_sequences = sum(q for q, _ in lengths), len(lengths)
    blocks = max(-(-n // BLOCK_TOKENS) for _, n in lengths)
    tables = torch.randperm(num_sequences * blocks).int().view(num_sequences, blocks)
    cache = (num_sequences * blocks, shape.num_kv_heads, BLOCK_TOKENS, shape.head_dim)
    kv_dtype = _KV_DTYPES[shape.kv_dtype]
    parts = [torch.zeros(cache, dtype=kv_dtype) for _ in "kv"]
    if shape.is_scaled:
        scales = (num_sequences * blocks, shape.num_kv_heads, BLOCK_TOKENS)
        parts += [torch.zeros(scales) for _ in "kv"]
    heads = (num_sequences * blocks * BLOCK_TOKENS, shape.num_kv_heads * shape.head_dim)
    write(tuple(parts), torch.arange(heads[0]), torch.randn(heads), torch.randn(heads))
    q = torch.randn(num_tokens, shape.num_heads, shape.head_dim).to(dtype)
    out = torch.full_like(q, float("nan"))
    starts = [0]
    for queries, _ in lengths:
        starts.append(starts[-1] + queries)
    sizes = Sizes(num_tokens, num_sequences, num_sequences)
    operands: Operands = {
        "q": q, "out": out, "block_tables": tables,
        "seq_lens": torch.tensor([n for _, n in lengths]).int(),
        "query_start": torch.tensor(starts).int(),
        "part_start": _part_start(shares, lengths),
        "num_sequences": num_sequences, "table_stride": blocks,
    }  # fmt: skip
    kept = [part.view(torch.uint16) if shape.is_scaled else part for part in parts[:2]]
    cache_names = ("k_cache", "v_cache", "k_scale", "v_scale")
    operands |= zip(cache_names, kept + parts[2:], strict=False)
    # What the cache holds of the step's own tokens, for launches that read it as values.
    new = [
        [part[length - queries :] for part in read(tuple(parts), tables[i], length)]
        for i, (queries, length) in enumerate(lengths)
    ]
    operands |= {
        name: torch.cat([each[index] for each in new]).flatten(1).to(dtype)
        for index, name in enumerate(("k_new", "v_new"))
    }
    names = ("partial", "partial_max", "partial_sum", "counters")
    for tiles in launches:
        for name, request in zip(names, scratch(shape, tiles), strict=False):
            count = request.num_bytes(sizes) // 4
            operands[name] = (
                torch.zeros(count, dtype=torch.int32)
                if name == "counters"
                else torch.full((count,), float("nan"))  # what others left there weighs nothing
            )
        run(variant(shape, arch, tiles), grid(shape, tiles, sizes), operands)
    tolerance = 5e-3 if shape.dtype == "fp16" else 2e-2
    for i, (queries, length) in enumerate(lengths):
        if length == 0:
            continue
        k, v = read(tuple(parts), tables[i, : -(-length // BLOCK_TOKENS)], length)
        want = attend(q[starts[i] : starts[i] + queries], k, v, shape)
        got = out[starts[i] : starts[i] + queries].float()
        torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)
        # Over many tokens the mean is small: what counts is its error as a share.
        if queries:
            error = torch.linalg.vector_norm(got - want) / torch.linalg.vector_norm(want)
            assert error < tolerance / 2, f"sequence {i} of {length} tokens is off by {error:.2%}"
    if "counters" in operands:
        counters = operands["counters"]
        assert isinstance(counters, torch.Tensor)
        assert not counters.any(), "counters are left at 0"


def _part_start(shares: Shares, lengths: list[tuple[int, int]]) -> torch.Tensor:
    """Where each sequence's further parts begin."""
    counts, ends = np.array(lengths, np.int32).T
    return torch.tensor([0, *shares.further_parts(counts, ends).cumsum()]).int()


def attention_shape(
    window: int = 0,
    soft_cap: float = 0.0,
    heads: int = 6,
    head_dim: int = 24,
    dtype: str = "fp16",
    kv_dtype: str = "",
) -> AttentionShape:
    """Two kv heads, and sizes that divide by nothing."""
    return AttentionShape(
        heads, 2, head_dim, head_dim**-0.5, window, soft_cap, dtype, kv_dtype or dtype, BLOCK_TOKENS
    )


DECODE_LENGTHS = [(1, 1), (1, 17), (1, 0), (1, 300), (1, 130)]
RAGGED_LENGTHS = [(1, 40), (13, 13), (5, 33), (1, 1), (4, 4), (0, 8), (9, 70)]
