"""Law 1: passes preserve meaning. reference(graph) equals reference(pass(graph)) in fp64."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compiler_service.checkpoints.sources import open_checkpoint
from compiler_service.models import lower_model
from compiler_service.passes import PIPELINE, run_passes
from compiler_service.passes.fuse_elementwise import fuse_add_norm, fuse_silu_mul
from compiler_service.passes.fuse_qkv_rope_write import fuse_qkv_rope_write
from compiler_service.passes.join_linears import join_linears
from compiler_service.passes.remove_dead_code import remove_dead_code
from kernels.ops import OPS
from kernels.reference import prompt_batch, run
from shared.ir import Graph, Node, TensorSpec
from tests.checkpoints import ARCHITECTURES, LLAMA3_ROPE, tiny_config, write_checkpoint
from tests.compiler_service.dense_weights import dense_weights

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in ARCHITECTURES},
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama3-rope": ("llama", {"rope_scaling": LLAMA3_ROPE}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen3-odd-sizes": ("qwen3", {"hidden_size": 60, "head_dim": 10, "intermediate_size": 77}),
    "mistral-one-kv-head": ("mistral", {"num_key_value_heads": 1}),
}
TOKENS = torch.tensor([5, 17, 200, 3, 3, 91, 250, 8, 44, 120, 7, 7, 63, 0, 31, 299, 12, 80, 9])


def _logits(graph: Graph, folder: Path) -> torch.Tensor:
    weights = dense_weights(graph, open_checkpoint(str(folder)), torch.float64)
    batch = prompt_batch(graph, [len(TOKENS)], torch.float64)
    return run(graph, weights, TOKENS.int(), batch)["logits"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_pass_preserves_meaning(variant: str, tmp_path: Path) -> None:
    family, sizes = VARIANTS[variant]
    folder = write_checkpoint(tmp_path, family, **sizes)
    graph = lower_model(tiny_config(family, **sizes), "float64")
    graph.verify(OPS)
    expected = _logits(graph, folder)
    assert expected.dtype == torch.float64
    assert float(expected.std()) > 0.1
    for run_pass in PIPELINE:
        graph = run_pass(graph)
        graph.verify(OPS)
        error = float((_logits(graph, folder) - expected).abs().max())
        assert error <= 1e-10, run_pass.__name__


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_pipeline_leaves_nothing_to_fuse(family: str) -> None:
    graph = run_passes(lower_model(tiny_config(family), "bfloat16"), OPS)
    ops = [node.op for node in graph.nodes]
    layer = ["linear", "qkv_rope_write", "attention", "linear", "rms_norm"]
    layer += ["linear", "silu_mul", "linear", "rms_norm"]
    assert ops == ["embedding", "rms_norm", *layer, *layer, "select_rows", "linear"]


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_pipeline_run_twice_changes_nothing(family: str) -> None:
    once = run_passes(lower_model(tiny_config(family), "bfloat16"), OPS)
    assert run_passes(once, OPS).to_json() == once.to_json()


def test_joined_weights_keep_their_parts_in_order() -> None:
    graph = join_linears(lower_model(tiny_config("qwen2"), "bfloat16"))
    qkv = graph.weights["layers.1.qkv"]
    assert qkv.shape == (128, 64)
    assert qkv.part_rows == (64, 32, 32)
    names = [part.split(".")[-2] for part in qkv.parts]
    assert names == ["q_proj", "k_proj", "v_proj"]
    assert graph.weights["layers.1.qkv.bias"].part_rows == (64, 32, 32)
    assert graph.weights["layers.0.gate_up"].shape == (256, 64)


def _chain(*nodes: Node, outputs: tuple[str, ...] = ("y",)) -> Graph:
    inputs = {"x": TensorSpec(("T", 8), "float32"), "z": TensorSpec(("T", 8), "float32")}
    return Graph(inputs, nodes, outputs, {}, {})


BLOCKED: dict[str, tuple[Callable[[Graph], Graph], Graph]] = {
    "silu_mul when the gate is read twice": (
        fuse_silu_mul,
        _chain(
            Node("split", ("x",), ("g", "u"), attrs={"sizes": (4, 4)}),
            Node("silu", ("g",), ("s",)),
            Node("mul", ("s", "u"), ("m",)),
            Node("add", ("m", "g"), ("y",)),
        ),
    ),
    "silu_mul when the halves are swapped": (
        fuse_silu_mul,
        _chain(
            Node("split", ("x",), ("u", "g"), attrs={"sizes": (4, 4)}),
            Node("silu", ("g",), ("s",)),
            Node("mul", ("s", "u"), ("y",)),
        ),
    ),
    "qkv_rope_write when q and k turn differently": (
        fuse_qkv_rope_write,
        _chain(
            Node("split", ("x",), ("q", "k", "v"), attrs={"sizes": (4, 2, 2)}),
            Node("rope", ("q",), ("qr",), attrs={"head_dim": 2, "inv_freq": (1.0,)}),
            Node("rope", ("k",), ("kr",), attrs={"head_dim": 2, "inv_freq": (0.5,)}),
            Node("kv_write", ("kr", "v"), ("kv",), attrs={"layer": 0}),
            Node("attention", ("qr", "kv"), ("y",)),
        ),
    ),
    "qkv_rope_write when v is read elsewhere": (
        fuse_qkv_rope_write,
        _chain(
            Node("split", ("x",), ("q", "k", "v"), attrs={"sizes": (4, 2, 2)}),
            Node("rope", ("q",), ("qr",), attrs={"head_dim": 2, "inv_freq": (1.0,)}),
            Node("rope", ("k",), ("kr",), attrs={"head_dim": 2, "inv_freq": (1.0,)}),
            Node("kv_write", ("kr", "v"), ("kv",), attrs={"layer": 0}),
            Node("attention", ("qr", "kv"), ("a",)),
            Node("add", ("a", "v"), ("y",)),
        ),
    ),
}


@pytest.mark.parametrize("case", BLOCKED)
def test_pattern_is_left_alone(case: str) -> None:
    """A fusion that would change meaning is not made."""
    run_pass, graph = BLOCKED[case]
    assert run_pass(graph) == graph


def test_sum_stays_a_value_when_it_is_an_output() -> None:
    graph = _chain(
        Node("add", ("x", "z"), ("s",)),
        Node("rms_norm", ("s",), ("y",), attrs={"eps": 0.1, "residual": False, "head_dim": 0}),
        outputs=("y", "s"),
    )
    (fused,) = fuse_add_norm(graph).nodes
    assert (fused.inputs, fused.outputs) == (("z", "x"), ("y", "s"))
    assert fused.attrs["residual"] is True


def test_dead_code_goes_and_cache_writes_that_are_read_stay() -> None:
    graph = _chain(
        Node("kv_write", ("x", "z"), ("kv",), attrs={"layer": 0}),
        Node("silu", ("x",), ("unread",)),
        Node("attention", ("x", "kv"), ("y",)),
    )
    assert [node.op for node in remove_dead_code(graph).nodes] == ["kv_write", "attention"]
