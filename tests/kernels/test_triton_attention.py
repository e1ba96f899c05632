"""Law 2 on the CPU: the attention kernel equals its formula, through Triton's interpreter."""

import pytest
import torch

from kernels.attention.launch import AttentionShape, AttentionTiles, grid, scratch, variant
from kernels.launch import Sizes
from tests.kernels.interpreted import INTERPRETER, run

_BLOCK_TOKENS = 4


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


def _check(
    shape: AttentionShape, tiles: AttentionTiles, lengths: list[tuple[int, int]], seed: int
) -> None:
    """`lengths`: (queries, tokens) of each sequence."""
    torch.manual_seed(seed)
    num_tokens, num_sequences = sum(q for q, _ in lengths), len(lengths)
    blocks = max(-(-n // _BLOCK_TOKENS) for _, n in lengths)
    tables = torch.randperm(num_sequences * blocks).int().view(num_sequences, blocks)
    cache = (num_sequences * blocks, _BLOCK_TOKENS, shape.num_kv_heads, shape.head_dim)
    k_cache, v_cache = torch.randn(cache).half(), torch.randn(cache).half()
    q = torch.randn(num_tokens, shape.num_heads, shape.head_dim).half()
    out = torch.full_like(q, float("nan"))
    starts = [0]
    for queries, _ in lengths:
        starts.append(starts[-1] + queries)
    sizes = Sizes(num_tokens, num_sequences, num_sequences)
    operands: dict[str, torch.Tensor | int] = {
        "q": q, "k_cache": k_cache, "v_cache": v_cache, "out": out, "block_tables": tables,
        "seq_lens": torch.tensor([n for _, n in lengths]).int(),
        "query_start": torch.tensor(starts).int(),
        "num_sequences": num_sequences, "table_stride": blocks,
    }  # fmt: skip
    names = ("partial", "partial_max", "partial_sum", "counters")
    for name, request in zip(names, scratch(shape, tiles), strict=False):
        dtype = torch.int32 if name == "counters" else torch.float32
        operands[name] = torch.zeros(request.num_bytes(sizes) // 4, dtype=dtype)
    run(variant(shape, INTERPRETER, tiles), grid(shape, tiles, sizes), operands)
    for i, (queries, length) in enumerate(lengths):
        if length == 0:
            continue
        rows = [tables[i, p // _BLOCK_TOKENS] * _BLOCK_TOKENS + p % _BLOCK_TOKENS for p in range(length)]
        k, v = (c.flatten(0, 1)[torch.stack(rows).long()] for c in (k_cache, v_cache))
        want = attend(q[starts[i] : starts[i] + queries], k, v, shape)
        got = out[starts[i] : starts[i] + queries].float()
        torch.testing.assert_close(got, want, atol=5e-3, rtol=5e-3)
    if tiles.splits > 1:
        counters = operands["counters"]
        assert isinstance(counters, torch.Tensor)
        assert not counters.any(), "counters are left at 0"


def _shape(window: int = 0, soft_cap: float = 0.0, heads: int = 6, head_dim: int = 24) -> AttentionShape:
    return AttentionShape(
        heads, 2, head_dim, head_dim**-0.5, window, soft_cap, "fp16", "fp16", _BLOCK_TOKENS
    )


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("window", "soft_cap"), [(0, 0.0), (37, 0.0), (0, 2.5)])
def test_decode_equals_formula(splits: int, window: int, soft_cap: float) -> None:
    """A sequence of length 0 is padding and is left alone."""
    tiles = AttentionTiles(1, 16, splits, is_decode=True)
    lengths = [(1, 1), (1, 17), (1, 0), (1, 300), (1, 130)]
    _check(_shape(window, soft_cap), tiles, lengths, seed=splits)


@pytest.mark.parametrize(("window", "soft_cap"), [(0, 0.0), (9, 0.0), (0, 2.5)])
def test_ragged_step_equals_formula(window: int, soft_cap: float) -> None:
    """Prompt chunks, whole prompts and single tokens share a step."""
    tiles = AttentionTiles(4, 16, 1)
    lengths = [(1, 40), (13, 13), (5, 33), (1, 1), (4, 4), (0, 8), (9, 70)]
    _check(_shape(window, soft_cap), tiles, lengths, seed=window)


def test_splits_of_ragged_step_equal_formula() -> None:
    _check(_shape(), AttentionTiles(2, 16, 4), [(3, 290), (1, 5), (7, 400)], seed=1)


def test_one_query_head_per_kv_head() -> None:
    _check(_shape(heads=2, head_dim=16), AttentionTiles(8, 16, 1), [(11, 11), (1, 30)], seed=2)
