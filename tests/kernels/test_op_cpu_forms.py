"""Law 2 on a CPU: an op's fast form equals its reference, at shapes that divide by nothing."""

from dataclasses import replace

import pytest
import torch

from kernels.cpu import CPU_FORMS, bind_node
from kernels.cpu_form import CpuTarget
from kernels.ops import OPS
from shared.ir import Attr, Graph, Node, TensorSpec, WeightSpec
from tests.kernels.cpu_targets import BY_TARGET, FP32, packed, ragged_batch, run_both, tolerance

INV_FREQ = (1.0, 0.31, 0.07, 0.009)
HEADS: dict[str, Attr] = {"layer": 1, "num_heads": 6, "num_kv_heads": 2, "head_dim": 8}


@BY_TARGET
@pytest.mark.parametrize("num_tokens", [1, 3, 17])
@pytest.mark.parametrize("has_residual", [False, True])
def test_rms_norm_equals_its_reference(
    target: CpuTarget, num_tokens: int, has_residual: bool
) -> None:
    torch.manual_seed(0)
    dtype = target.activation_dtype
    attrs: dict[str, Attr] = {"eps": 1e-5, "residual": has_residual, "head_dim": 0}
    node = Node("rms_norm", (), (), attrs=attrs)
    inputs = [torch.randn(num_tokens, 37).to(dtype) for _ in range(1 + has_residual)]
    weights = {"weight": packed(torch.randn(37), "plain", target.name)}
    node = replace(node, outputs=("y", "s")[: 1 + has_residual])
    expected, found = run_both(
        node, inputs, weights, target, ragged_batch([(0, 1)], dtype, scattered=False)
    )
    for e, f in zip(expected, found, strict=True):
        assert f.dtype == dtype
        torch.testing.assert_close(f.double(), e, rtol=tolerance(target), atol=tolerance(target))


@BY_TARGET
def test_rms_norm_of_heads_equals_its_reference(target: CpuTarget) -> None:
    torch.manual_seed(0)
    attrs: dict[str, Attr] = {"eps": 1e-5, "residual": False, "head_dim": 8}
    node = Node("rms_norm", (), ("y",), attrs=attrs)
    x = torch.randn(5, 24).to(target.activation_dtype)
    weights = {"weight": packed(torch.randn(8), "plain", target.name)}
    batch = ragged_batch([(0, 1)], target.kv_dtype, scattered=False)
    (expected,), (found,) = run_both(node, [x], weights, target, batch)
    torch.testing.assert_close(
        found.double(), expected, rtol=tolerance(target), atol=tolerance(target)
    )


@BY_TARGET
@pytest.mark.parametrize("layout", ["plain", "int8_channel", "int8_group", "int4_group"])
def test_embedding_equals_its_reference(target: CpuTarget, layout: str) -> None:
    torch.manual_seed(0)
    weights = {"weight": packed(torch.randn(19, 64), layout, target.name, 32)}
    node = Node("embedding", (), ("x",), attrs={"dtype": target.name})
    token_ids = torch.tensor([18, 0, 3, 3], dtype=torch.int32)
    batch = ragged_batch([(0, 1)], target.kv_dtype, scattered=False)
    (expected,), (found,) = run_both(node, [token_ids], weights, target, batch)
    assert found.dtype == target.activation_dtype
    torch.testing.assert_close(
        found.double(), expected, rtol=tolerance(target), atol=tolerance(target)
    )


@BY_TARGET
@pytest.mark.parametrize("num_tokens", [1, 7])
def test_silu_mul_equals_its_reference(target: CpuTarget, num_tokens: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(num_tokens, 2 * 13).to(target.activation_dtype)
    batch = ragged_batch([(0, 1)], target.kv_dtype, scattered=False)
    (expected,), (found,) = run_both(Node("silu_mul", (), ("y",)), [x], {}, target, batch)
    torch.testing.assert_close(
        found.double(), expected, rtol=tolerance(target), atol=tolerance(target)
    )


def test_select_rows_equals_its_reference() -> None:
    batch = ragged_batch([(0, 5)], torch.float32, scattered=False)
    x = torch.randn(5, 3)
    (expected,), (found,) = run_both(Node("select_rows", (), ("y",)), [x], {}, FP32, batch)
    assert torch.equal(found.double(), expected)


SEQUENCES = {
    "one decode": [(9, 1)],
    "one first token": [(0, 1)],
    "decodes of one length": [(9, 1)] * 3,
    "ragged decodes": [(0, 1), (300, 1), (9, 1), (30, 1)],
    "one whole prompt": [(0, 11)],
    "whole prompts": [(0, 5), (0, 11), (0, 5)],
    "chunks": [(7, 6), (32, 3), (7, 6)],
    "mixed": [(9, 1), (0, 6), (41, 1), (13, 5), (0, 6)],
    "more than a tile": [(150, 75), (0, 139), (61, 33)],
}


@BY_TARGET
@pytest.mark.parametrize("sequences", SEQUENCES.values(), ids=SEQUENCES)
@pytest.mark.parametrize("scattered", [False, True], ids=["in a row", "scattered"])
@pytest.mark.parametrize(
    ("window", "soft_cap"), [(0, 0.0), (5, 0.0), (40, 0.0), (0, 1.5), (5, 1.5)]
)
def test_attention_equals_its_reference(
    target: CpuTarget,
    sequences: list[tuple[int, int]],
    scattered: bool,
    window: int,
    soft_cap: float,
) -> None:
    batch = ragged_batch(sequences, target.kv_dtype, scattered=scattered)
    attrs: dict[str, Attr] = {**HEADS, "scale": 0.4, "window": window, "soft_cap": soft_cap}
    node = Node("attention", (), ("y",), attrs=attrs)
    q = torch.randn(len(batch.positions_T), 48, generator=torch.Generator().manual_seed(1))
    q = q.to(target.activation_dtype)
    # Stale blocks hold anything finite; what is past a table's end is undefined.
    (expected,), (found,) = run_both(node, [q, torch.empty(0)], {}, target, batch)
    assert found.dtype == target.activation_dtype
    torch.testing.assert_close(
        found.double(), expected, rtol=tolerance(target), atol=tolerance(target)
    )


@BY_TARGET
@pytest.mark.parametrize(("heads", "head_dim"), [(3, 64), (1, 40), (5, 96)])
def test_attention_of_wide_heads_equals_its_reference(
    target: CpuTarget, heads: int, head_dim: int
) -> None:
    """Of head dims that fill their vectors and that do not, and of groups that do not divide a block of rows."""
    generator = torch.Generator().manual_seed(heads)
    batch = ragged_batch([(70, 70), (0, 1), (0, 35), (129, 1)], target.kv_dtype, scattered=True)
    shape = (*batch.kv_caches[0][0].shape[:3], head_dim)
    batch.kv_caches = [
        (
            torch.randn(shape, generator=generator).to(target.kv_dtype),
            torch.randn(shape, generator=generator).to(target.kv_dtype),
        )
        for _ in range(2)
    ]
    how: dict[str, Attr] = {"scale": head_dim**-0.5, "window": 0, "soft_cap": 0.0, "layer": 1}
    sizes: dict[str, Attr] = {"num_heads": 2 * heads, "num_kv_heads": 2, "head_dim": head_dim}
    q = torch.randn(len(batch.positions_T), 2 * heads * head_dim, generator=generator)
    node = Node("attention", (), ("y",), attrs={**how, **sizes})
    inputs = [q.to(target.activation_dtype), torch.empty(0)]
    (expected,), (found,) = run_both(node, inputs, {}, target, batch)
    torch.testing.assert_close(
        found.double(), expected, rtol=tolerance(target), atol=tolerance(target)
    )


@BY_TARGET
@pytest.mark.parametrize("num_queries", [1, 70])
def test_attention_to_a_key_that_is_no_number_is_none(target: CpuTarget, num_queries: int) -> None:
    """It must reach the logits, where it ends its request, and no other sequence."""
    batch = ragged_batch([(5, num_queries), (3, num_queries)], target.kv_dtype, scattered=False)
    keys = batch.kv_caches[1][0]
    keys[batch.block_tables_SB[0, 0], :, 2] = torch.nan
    node = Node(
        "attention", (), ("y",), attrs={**HEADS, "scale": 0.4, "window": 0, "soft_cap": 0.0}
    )
    q = torch.randn(2 * num_queries, 48).to(target.activation_dtype)
    found = bind_node(node, {}, target)(q, torch.empty(0), batch)
    assert bool(found[:num_queries].isnan().all())
    assert bool(found[num_queries:].isfinite().all())


@BY_TARGET
@pytest.mark.parametrize("sequences", [[(9, 1)], [(3, 1), (0, 5), (13, 3)]], ids=str)
@pytest.mark.parametrize("has_norm", [False, True])
def test_qkv_rope_write_equals_its_reference(
    target: CpuTarget, sequences: list[tuple[int, int]], has_norm: bool
) -> None:
    torch.manual_seed(0)
    batch = ragged_batch(sequences, target.kv_dtype, scattered=True)
    attrs: dict[str, Attr] = {
        **HEADS, "inv_freq": INV_FREQ, "attention_scaling": 1.25, "eps": 1e-6,
    }  # fmt: skip
    weights = {}
    if has_norm:
        weights = {
            r: packed(torch.rand(8) + 0.5, "plain", target.name) for r in ("q_norm", "k_norm")
        }
    node = Node("qkv_rope_write", (), ("q", "kv"), attrs=attrs)
    qkv = torch.randn(len(batch.positions_T), 80).to(target.activation_dtype)
    before = [cache.clone() for cache in batch.kv_caches[0]]
    expected, found = run_both(node, [qkv], weights, target, batch)
    limit = tolerance(target)
    torch.testing.assert_close(found[0].double(), expected[0], rtol=limit, atol=limit)
    slots = batch.slot_mapping_T.long()
    k, v = (c.transpose(1, 2).reshape(-1, 2, 8)[slots] for c in batch.memo["reference_caches"][1])
    own_k, own_v = (c.transpose(1, 2).reshape(-1, 2, 8)[slots].double() for c in batch.kv_caches[1])
    torch.testing.assert_close(own_k, k, rtol=limit, atol=limit)
    torch.testing.assert_close(own_v, v, rtol=limit, atol=limit)
    assert all(map(torch.equal, before, batch.kv_caches[0])), "another layer's cache was written"


def test_every_op_gives_the_specs_that_it_infers() -> None:
    """Every row of OPS is run on a graph that holds all of them."""
    f, w = "float32", WeightSpec
    heads: dict[str, Attr] = {**HEADS, "layer": 0}
    rope: dict[str, Attr] = {"head_dim": 8, "inv_freq": INV_FREQ, "attention_scaling": 1.0}
    attention: dict[str, Attr] = {**heads, "scale": 0.3, "window": 0, "soft_cap": 0.0}
    norm: dict[str, Attr] = {"eps": 1e-5, "residual": False, "head_dim": 0}
    nodes = (
        Node("embedding", ("token_ids",), ("x",), {"weight": "e"}, {"dtype": f}),
        Node("linear", ("x",), ("qkv",), {"weight": "wqkv", "bias": "bqkv"}),
        Node("split", ("qkv",), ("q", "k", "v"), {}, {"sizes": (48, 16, 16)}),
        Node("rope", ("q",), ("q2",), {}, rope),
        Node("rope", ("k",), ("k2",), {}, rope),
        Node("kv_write", ("k2", "v"), ("kv",), {}, heads),
        Node("attention", ("q2", "kv"), ("a",), {}, attention),
        Node("qkv_rope_write", ("qkv",), ("q3", "kv3"), {}, {**heads, **rope, "eps": 0.0}),
        Node("attention", ("q3", "kv3"), ("a3",), {}, attention),
        Node("add", ("a", "a3"), ("sum",)),
        Node("silu", ("sum",), ("act",)),
        Node("mul", ("act", "sum"), ("product",)),
        Node("rms_norm", ("product",), ("n",), {"weight": "g"}, norm),
        Node("silu_mul", ("n",), ("half",)),
        Node("select_rows", ("half",), ("last",)),
    )
    weights = {
        "e": w((11, 48), ("e",), (11,), f),
        "wqkv": w((80, 48), ("wqkv",), (80,), f),
        "bqkv": w((80,), ("bqkv",), (80,), f),
        "g": w((48,), ("g",), (48,), f),
    }
    inputs = {"token_ids": TensorSpec(("T",), "int32")}
    graph = Graph(inputs, nodes, ("last",), weights, {})
    assert {node.op for node in nodes} == set(OPS), "an op is missing here"
    assert set(CPU_FORMS) <= set(OPS)
    graph.verify(OPS)
    specs = graph.infer(OPS)
    batch = ragged_batch([(0, 3)], torch.float32, scattered=False)
    batch.kv_caches = [batch.kv_caches[0]]
    dims = {"T": 3, "R": 2}
    values = {"token_ids": torch.tensor([1, 2, 10], dtype=torch.int32)}
    dense = {name: torch.randn(spec.shape) for name, spec in weights.items()}
    for node in nodes:
        outputs = OPS[node.op].reference(
            node,
            [values[n] for n in node.inputs],
            {r: dense[n] for r, n in node.weights.items()},
            batch,
        )
        for name, value in zip(node.outputs, outputs, strict=True):
            values[name] = value
            spec = specs[name]
            if spec.dtype != "effect":
                assert list(value.shape) == [dims.get(str(d), d) for d in spec.dims], node
                assert str(value.dtype) == f"torch.{spec.dtype}", node
    assert torch.allclose(values["a"], values["a3"], atol=1e-6), "fused and unfused differ"


@pytest.mark.parametrize(
    ("node", "dims"),
    [
        (Node("linear", ("x",), ("y",), {"weight": "w"}), ("T", 7)),
        (Node("split", ("x",), ("a", "b"), {}, {"sizes": (3, 3)}), ("T", 7)),
        (Node("silu_mul", ("x",), ("y",)), ("T", 7)),
        (Node("select_rows", ("x",), ("y",)), ("R", 8)),
        (Node("silu", ("x", "x"), ("y",)), ("T", 8)),
        (
            Node(
                "rope",
                ("x",),
                ("y",),
                {},
                {"head_dim": 8, "inv_freq": (1.0,), "attention_scaling": 1.0},
            ),
            ("T", 8),
        ),
    ],
    ids=lambda value: value.op if isinstance(value, Node) else str(value),
)
def test_contradictory_node_is_refused(node: Node, dims: tuple[int | str, ...]) -> None:
    weights = {"weight": WeightSpec((5, 8), ("w",), (5,), "float32")} if node.weights else {}
    inputs = (TensorSpec(dims, "float32"),) * len(node.inputs)
    with pytest.raises(AssertionError):
        OPS[node.op].infer(node, inputs, weights)
