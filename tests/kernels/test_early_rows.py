"""Rows are selected as early as a graph allows, which changes no logit."""

import pytest
import torch

from compiler_service.models import lower_model
from compiler_service.passes import run_passes
from kernels import reference
from kernels.early_rows import select_rows_early
from kernels.ops import OPS
from shared.ir import Graph, Node, TensorSpec, WeightSpec
from tests.checkpoints import tiny_config

_ROWS = torch.tensor([4, 1])
_NORM = {"eps": 1e-5, "residual": False, "head_dim": 0}
_NODES = (
    Node("linear", ("x",), ("y",), {"weight": "square", "bias": "gain"}),
    Node("rms_norm", ("x",), ("y",), {"weight": "gain"}, _NORM),
    Node("rms_norm", ("x",), ("y",), {"weight": "head"}, {**_NORM, "head_dim": 4}),
    Node("rms_norm", ("x", "x2"), ("y", "sum"), {"weight": "gain"}, {**_NORM, "residual": True}),
    Node("split", ("x",), ("a", "b"), {}, {"sizes": (3, 5)}),
    Node("silu", ("x",), ("y",)),
    Node("mul", ("x", "x2"), ("y",)),
    Node("add", ("x", "x2"), ("y",)),
    Node("silu_mul", ("x",), ("y",)),
)


def _fused(family: str) -> Graph:
    return run_passes(lower_model(tiny_config(family), "float32"), OPS)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("is_fused", [True, False])
def test_selecting_early_changes_no_logit(family: str, is_fused: bool) -> None:
    graph = _fused(family) if is_fused else lower_model(tiny_config(family), "float32")
    early = select_rows_early(graph)
    early.verify(OPS)
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: torch.randn(spec.shape, generator=generator, dtype=torch.float64) * 0.3
        for name, spec in graph.weights.items()
    }
    lengths, rows = (3, 9, 5), (2, 11, 16)
    token_ids = torch.randint(0, 50, (sum(lengths),), generator=generator).int()
    expected, found = (
        reference.run(
            each, weights, token_ids,
            reference.prompt_batch(each, lengths, torch.float64, logit_rows=rows),
        )["logits"]
        for each in (graph, early)
    )  # fmt: skip
    assert found.shape == (len(rows), graph.config["vocab_size"])
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_all_after_the_last_attention_runs_on_selected_rows() -> None:
    """Of the last layer only queries, keys and values are computed for every token; of the others everything is."""
    graph = select_rows_early(_fused("llama"))
    specs = graph.infer(OPS)
    is_selected = [specs[node.inputs[0]].dims[0] == "R" for node in graph.nodes]
    (last,) = (
        index
        for index, node in enumerate(graph.nodes)
        if node.op == "attention"
        and node.attrs["layer"] == int(str(graph.config["num_layers"])) - 1
    )
    after = [node.op for node in graph.nodes[last + 1 :]]
    assert not any(is_selected[: last + 1])
    assert after[0] == "select_rows"
    assert all(is_selected[last + 2 :])
    assert after.count("linear") == 4


def test_what_something_else_reads_is_computed_for_all_rows() -> None:
    """A norm that is given out as well, and all before it, has a row for each token."""
    weights = {
        name: WeightSpec(shape, (name,), shape[:1], "float32")
        for name, shape in {"table": (11, 8), "gain": (8,), "square": (8, 8)}.items()
    }
    nodes = (
        Node("embedding", ("token_ids",), ("x",), {"weight": "table"}, {"dtype": "float32"}),
        Node("linear", ("x",), ("h",), {"weight": "square"}),
        Node("rms_norm", ("h",), ("n",), {"weight": "gain"}, _NORM),
        Node("select_rows", ("n",), ("last",)),
        Node("linear", ("last",), ("logits",), {"weight": "square"}),
    )
    inputs = {"token_ids": TensorSpec(("T",), "int32")}
    for outputs, expected in (
        (("logits",), ["embedding", "select_rows", "linear", "rms_norm", "linear"]),
        (("logits", "n"), [node.op for node in nodes]),
    ):
        early = select_rows_early(Graph(inputs, nodes, outputs, weights, {}))
        early.verify(OPS)
        assert [node.op for node in early.nodes] == expected


@pytest.mark.parametrize("node", _NODES, ids=lambda node: f"{node.op}-{len(node.inputs)}")
def test_row_of_a_row_wise_op_depends_on_that_row_alone(node: Node) -> None:
    assert OPS[node.op].is_row_wise
    torch.manual_seed(2)
    weights = {"square": torch.randn(8, 8), "gain": torch.randn(8), "head": torch.randn(4)}
    inputs = [torch.randn(6, 8, dtype=torch.float64) for _ in node.inputs]

    def outputs(*rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = {role: weights[name].double() for role, name in node.weights.items()}
        return OPS[node.op].reference(node, rows, values, None)  # type: ignore[arg-type]

    for some, every in zip(outputs(*(x[_ROWS] for x in inputs)), outputs(*inputs), strict=True):
        assert torch.allclose(some, every[_ROWS], rtol=1e-12)


def test_every_row_wise_op_is_known_here() -> None:
    assert {node.op for node in _NODES} == {op.name for op in OPS.values() if op.is_row_wise}
