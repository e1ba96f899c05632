"""Keys and values in 8 bits: what is written is read, to the nearest code, by the reference and by the CPU forms."""

from dataclasses import replace

import pytest
import torch

from kernels.attention.op import attended
from kernels.batch import StepBatch
from kernels.cpu import bind_node
from kernels.cpu_form import CpuTarget
from kernels.kv_cache import (
    EIGHT_BIT_FORMATS,
    KvFormat,
    LayerCache,
    by_layer,
    kv_format,
    read,
    write,
)
from kernels.ops import OPS
from shared.ir import Attr, Graph, Node

BY_FORMAT = pytest.mark.parametrize("name", EIGHT_BIT_FORMATS)
HEADS: dict[str, Attr] = {"layer": 0, "num_heads": 6, "num_kv_heads": 2, "head_dim": 8}
# Half a code's distance from the next: of a head's largest value, and of e4m3's three mantissa bits.
STEPS = {"int8": (0.5 / 127, 0.0), "fp8": (2.0**-10 / 448, 2.0**-4)}
BLOCK_TOKENS = 4


def _graph(kv_cache: str) -> Graph:
    config: dict[str, Attr] = {
        "dtype": "bfloat16",
        "num_layers": 3,
        "num_kv_heads": 2,
        "head_dim": 8,
    }
    if kv_cache:
        config["kv_cache"] = kv_cache
    return Graph({}, (), (), {}, config)


def _cache(name: str, num_blocks: int) -> LayerCache:
    return by_layer(EIGHT_BIT_FORMATS[name].allocate(_graph(name), num_blocks, BLOCK_TOKENS))[0]


def _batch(sequences: list[tuple[int, int]], cache: LayerCache) -> StepBatch:
    """A step of (tokens cached before, tokens computed), with blocks in no order."""
    blocks = [-(-(start + count) // BLOCK_TOKENS) for start, count in sequences]
    ids = torch.randperm(sum(blocks), generator=torch.Generator().manual_seed(2))
    tables = torch.zeros(len(sequences), max(blocks), dtype=torch.int32)
    positions, slots = [], []
    for row, (start, count) in enumerate(sequences):
        own = ids[sum(blocks[:row]) :][: blocks[row]]
        tables[row, : blocks[row]] = own
        at = torch.arange(start, start + count)
        positions.append(at)
        slots.append(own[at // BLOCK_TOKENS] * BLOCK_TOKENS + at % BLOCK_TOKENS)
    return StepBatch(
        positions_T=torch.cat(positions).int(),
        slot_mapping_T=torch.cat(slots).int(),
        block_tables_SB=tables,
        seq_lens_S=torch.tensor([sum(s) for s in sequences]).int(),
        query_start_S1=torch.tensor([0, *(count for _, count in sequences)]).cumsum(0).int(),
        logit_rows_R=torch.zeros(1).int(),
        kv_caches=[cache],
    )


def _target(name: str) -> CpuTarget:
    dtype = getattr(torch, EIGHT_BIT_FORMATS[name].dtype)
    return CpuTarget(torch.float32, dtype, False, False, "a test asked for it")


@BY_FORMAT
@pytest.mark.parametrize("seed", range(5))
def test_what_is_written_is_read_to_the_nearest_code(name: str, seed: int) -> None:
    """Each head of each token has a scale of its own: one of 1e-4 beside one of 1e4 loses nothing."""
    torch.manual_seed(seed)
    cache = _cache(name, 5)
    slots = torch.randperm(5 * BLOCK_TOKENS)[:13]
    size = 10.0 ** torch.randint(-4, 5, (13, 2, 1))
    k, v = (torch.randn(13, 2, 8) * size for _ in "kv")
    write(cache, slots, k.flatten(1), v.flatten(1))
    of_largest, of_own = STEPS[name]
    for found, wanted in zip(read(cache, torch.arange(5), 5 * BLOCK_TOKENS), (k, v), strict=True):
        limit = of_largest * wanted.abs().amax(-1, keepdim=True) + of_own * wanted.abs()
        assert ((found[slots] - wanted).abs() <= limit * 1.0001).all()


@BY_FORMAT
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_not_hidden(name: str, bad: float) -> None:
    """An engine ends itself when it finds NaN in its logits: a cache must not make zeros of it."""
    cache, k = _cache(name, 1), torch.ones(1, 16)
    k[0, 3] = bad
    write(cache, torch.tensor([2]), k, torch.ones(1, 16))
    keys, values = read(cache, torch.tensor([0]), 3)
    assert keys[2, 0].isnan().any()
    assert keys[2, 1].isfinite().all()
    assert values.isfinite().all()


@BY_FORMAT
@pytest.mark.parametrize("sequences", [[(9, 1)], [(3, 1), (0, 5), (70, 40)]], ids=str)
@pytest.mark.parametrize(("window", "soft_cap"), [(0, 0.0), (6, 2.5)])
def test_cpu_forms_equal_references(
    name: str, sequences: list[tuple[int, int]], window: int, soft_cap: float
) -> None:
    """A step's keys are written and attended to, over a cache that earlier steps have filled."""
    torch.manual_seed(0)
    num_blocks = sum(-(-sum(s) // BLOCK_TOKENS) for s in sequences)
    cache = _cache(name, num_blocks)
    write(
        cache,
        torch.arange(num_blocks * BLOCK_TOKENS),
        *torch.randn(2, num_blocks * BLOCK_TOKENS, 16),
    )
    twin = tuple(part.clone() for part in cache)
    batch = _batch(sequences, cache)
    rope: dict[str, Attr] = {
        "inv_freq": (1.0, 0.3, 0.1, 0.01),
        "attention_scaling": 1.0,
        "eps": 1e-6,
    }
    writes = Node("qkv_rope_write", (), ("q", "kv"), attrs={**HEADS, **rope})
    limits: dict[str, Attr] = {"scale": 0.4, "window": window, "soft_cap": soft_cap}
    attends = Node("attention", (), ("y",), attrs={**HEADS, **limits})
    qkv = torch.randn(len(batch.positions_T), 80)
    q, _ = bind_node(writes, {}, _target(name))(qkv, batch)
    found = bind_node(attends, {}, _target(name))(q, None, batch)
    reference = replace(batch, kv_caches=[twin], memo={})
    expected_q, effect = OPS["qkv_rope_write"].reference(writes, [qkv], {}, reference)
    (expected,) = OPS["attention"].reference(attends, [expected_q, effect], {}, reference)
    for own, wanted in zip(cache, twin, strict=True):
        # Angles differ in their last bits, so a value between two codes may become either.
        close = torch.isclose(own.float(), wanted.float(), rtol=0.13, atol=1.0)
        assert close.all()
        assert (own.float() == wanted.float()).float().mean() > 0.98 or own.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0.01)


@BY_FORMAT
@pytest.mark.parametrize("num_tokens", [1, 13])
def test_cpu_form_writes_the_codes_of_the_reference(name: str, num_tokens: int) -> None:
    """A head of zeros, tiny ones, a NaN and an infinity among them. A quotient's last bit may be another."""
    torch.manual_seed(0)
    cache = _cache(name, 5)
    twin = tuple(part.clone() for part in cache)
    batch = _batch([(3, num_tokens)], cache)
    size = 10.0 ** torch.randint(-4, 5, (num_tokens, 2, 1))
    k, v = (torch.randn(num_tokens, 2, 8) * size for _ in "kv")
    k[0, 1] = 0
    if num_tokens > 1:
        k[1:3, 0] *= 1e-36
        k[5, 1, 3], v[6, 0, 2] = torch.nan, -torch.inf
    # Angles of 0: what is turned is what is written.
    attrs: dict[str, Attr] = {"inv_freq": (0.0,) * 4, "attention_scaling": 1.0, "eps": 1e-6}
    writes = Node("qkv_rope_write", (), ("q", "kv"), attrs={**HEADS, **attrs})
    qkv = torch.cat((torch.zeros(num_tokens, 48), k.flatten(1), v.flatten(1)), 1)
    bind_node(writes, {}, _target(name))(qkv, batch)
    write(twin, batch.slot_mapping_T, k.flatten(1), v.flatten(1))
    for own, wanted in zip(cache[2:], twin[2:], strict=True):
        torch.testing.assert_close(own, wanted, rtol=2e-7, atol=0.0, equal_nan=True)
    for own, wanted in zip(cache[:2], twin[:2], strict=True):
        own_bits, bits = (part.view(torch.uint8).int() for part in (own, wanted))
        assert bits.any()
        assert (own_bits - bits).abs().max() <= 1
        assert (own_bits != bits).sum() <= 1


def _error_over(name: str, length: int) -> float:
    """Of attention over codes, as a share of that over fp32. A channel of the keys is 20 times the others."""
    torch.manual_seed(0)
    graph = replace(_graph(name), config={**_graph(name).config, "head_dim": 64, "num_layers": 1})
    kept = EIGHT_BIT_FORMATS[name].allocate(graph, length // BLOCK_TOKENS, BLOCK_TOKENS)
    (cache,) = by_layer(kept)
    k, v, q = torch.randn(length, 2, 64), torch.randn(length, 2, 64), torch.randn(1, 2, 64)
    k[..., 5] *= 20
    q[..., 5] /= 20
    write(cache, torch.arange(length), k.flatten(1), v.flatten(1))
    heads: dict[str, Attr] = {"num_heads": 2, "num_kv_heads": 2, "head_dim": 64}
    limits: dict[str, Attr] = {"scale": 0.125, "window": 0, "soft_cap": 0.0}
    node = Node("attention", (), ("y",), attrs={"layer": 0, **heads, **limits})
    last = torch.tensor([length - 1])
    coded_k, coded_v = read(cache, torch.arange(length // BLOCK_TOKENS), length)
    exact, coded = attended(node, q, k, v, last), attended(node, q, coded_k, coded_v, last)
    return float(torch.linalg.vector_norm(coded - exact) / torch.linalg.vector_norm(exact))


@BY_FORMAT
def test_error_of_codes_does_not_grow_with_the_context(name: str) -> None:
    """Rounding is to nearest and as often up as down: over 32,768 tokens it averages out as the values do."""
    short, long = _error_over(name, 512), _error_over(name, 32768)
    assert 0.001 < long < 0.08
    assert long < 1.5 * short


def test_bytes_of_a_token_count_codes_and_scales() -> None:
    assert kv_format(_graph("")).bytes_per_token(_graph("")) == 3 * 2 * 2 * 8 * 2
    assert kv_format(_graph("fp8")).bytes_per_token(_graph("fp8")) == 3 * 2 * 2 * (8 + 4)
    for name in ("", "int8"):
        kept = kv_format(_graph(name))
        parts = kept.allocate(_graph(name), 10, BLOCK_TOKENS)
        assert sum(part.nbytes for part in parts) == kept.bytes_per_token(_graph(name)) * 40
    assert kv_format(_graph(""), "float32") == KvFormat("float32")
