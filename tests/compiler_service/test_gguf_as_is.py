"""GGUF's own quantization, kept: an engine's values are those of the library that defines them."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from hypothesis import given
from hypothesis import strategies as st

from compiler_service.builder import BuildRequest, build
from compiler_service.checkpoints.gguf_blocks import BLOCK_FORMS
from compiler_service.checkpoints.sources import open_checkpoint
from compiler_service.quantization.as_is import AS_IS, notes_of
from compiler_service.resolve import resolve
from kernels.linear.layouts import LAYOUTS
from kernels.reference import dense
from shared.engine import QuantConfig
from shared.ir import Graph
from shared.store.local import LocalStore
from shared.store.weights import WeightReader
from tests.checkpoints import write_checkpoint
from tests.compiler_service.gguf_files import random_blocks, write_gguf
from tests.compiler_service.quantized_cases import UNSET_QUANT

SIZES = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}


def _q4_k_m(name: str) -> str:
    """As llama.cpp mixes types: more bits for the first layer's v and down, and for the head."""
    if name == "lm_head.weight" or name.endswith(("0.self_attn.v_proj.weight", "down_proj.weight")):
        return "Q6_K"
    return "Q4_K"


def _engine(uri: str, tmp_path: Path) -> tuple[Graph, dict[str, torch.Tensor]]:
    resolved = resolve(uri, ["cpu"], QuantConfig(AS_IS), "", tmp_path)
    store = LocalStore(tmp_path / "store")
    request = BuildRequest(uri, resolved.keys["cpu"], "m", tmp_path)
    engine = build(request, store, lambda progress: None)
    graph = Graph.from_json(store.read_all(engine.layer("graph.json").digest).decode())
    with WeightReader(store, engine) as reader:
        return graph, dense(graph, {name: reader.roles(name) for name in graph.weights})


def _require_same_values(uri: str, graph: Graph, stored: dict[str, torch.Tensor]) -> None:
    """What is kept equals the library's dequantization bit for bit; the rest is rounded once."""
    checkpoint = open_checkpoint(uri)
    for name, weight in graph.weights.items():
        expected = torch.cat([checkpoint.read(part) for part in weight.parts]).float()
        if weight.layout == "plain":
            expected = expected.bfloat16().float()
        assert torch.equal(stored[name], expected), name


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("kind", BLOCK_FORMS, ids=lambda kind: kind.name)
def test_blocks_in_our_layout_have_the_values_of_the_library(
    kind: gguf.GGMLQuantizationType, seed: int
) -> None:
    form, (_, block_bytes) = BLOCK_FORMS[kind], gguf.GGML_QUANT_SIZES[kind]
    blocks = random_blocks(kind, (37, 1024), seed)
    expected = torch.from_numpy(dequantize(blocks, kind))
    packed = form.pack(torch.from_numpy(blocks).view(37, -1, block_bytes))
    assert torch.equal(LAYOUTS[form.layout].unpack(packed), expected)
    found = {role: (tuple(t.shape), str(t.dtype)[6:]) for role, t in packed.items()}
    assert found == LAYOUTS[form.layout].roles((37, 1024), "float32", form.group_size)
    assert len(expected.unique()) > 1000


@given(scale=st.floats(-0.109375, 0.109375, width=16), least=st.floats(-0.03125, 0.03125, width=16))
def test_minimum_and_scale_are_exact_in_our_layout(scale: float, least: float) -> None:
    """Q4_1: d q + m = (q - 8) d + (m + 8 d), bit for bit, while m + 8 d is below 1."""
    head = np.array([scale, least], dtype=np.float16).view(np.uint8)
    block = np.concatenate([head, np.arange(16, dtype=np.uint8) * 17])[None]
    expected = torch.from_numpy(dequantize(block, gguf.GGMLQuantizationType.Q4_1))
    form = BLOCK_FORMS[gguf.GGMLQuantizationType.Q4_1]
    packed = form.pack(torch.from_numpy(block)[None])
    assert torch.equal(LAYOUTS[form.layout].unpack(packed), expected)


@pytest.mark.parametrize(
    ("kind", "layout"), [("Q8_0", "int8_group"), ("Q4_0", "int4_group"), ("Q4_1", "int4_group")]
)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_engine_keeps_what_the_file_has(
    family: str, kind: str, layout: str, tmp_path: Path
) -> None:
    """Llama's q and k are put in order without unpacking; embedding and tied head too."""
    folder = write_checkpoint(tmp_path / "hf", family, tie_word_embeddings=True)
    uri = str(write_gguf(tmp_path / "m.gguf", folder, kind))
    graph, stored = _engine(uri, tmp_path)
    _require_same_values(uri, graph, stored)
    matrices = {name: w for name, w in graph.weights.items() if len(w.shape) == 2}
    assert {weight.layout for weight in matrices.values()} == {layout}
    assert notes_of(graph) == (f"{kind}: 15 tensors kept exactly as {layout} 32",)


def test_mixed_file_is_kept_but_for_weights_whose_parts_differ(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "hf", **SIZES)
    uri = str(write_gguf(tmp_path / "m.gguf", folder, _q4_k_m))
    graph, stored = _engine(uri, tmp_path)
    _require_same_values(uri, graph, stored)
    layouts = {name: weight.layout for name, weight in graph.weights.items()}
    assert layouts["layers.0.qkv"] == "plain"
    assert layouts["layers.1.qkv"] == layouts["layers.0.gate_up"] == "int4_group"
    assert layouts["layers.0.down"] == layouts["lm_head"] == "int8_group"
    mixed = "dequantized to bfloat16: it is joined with Q4_K, Q6_K"
    assert notes_of(graph) == (
        f"Q4_K: 2 tensors {mixed}",
        "Q4_K: 10 tensors kept exactly as int4_group 32",
        f"Q6_K: 1 tensor {mixed}",
        "Q6_K: 3 tensors kept exactly as int8_group 16",
    )


def test_type_without_a_layout_is_dequantized_and_said_so(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "hf")
    uri = str(write_gguf(tmp_path / "m.gguf", folder, "Q5_1"))
    graph, stored = _engine(uri, tmp_path)
    _require_same_values(uri, graph, stored)
    assert notes_of(graph) == ("Q5_1: 16 tensors dequantized to bfloat16: no layout holds it",)


def test_unset_quant_keeps_a_quantized_file_as_it_is(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "hf")
    for kind, scheme in (("Q8_0", AS_IS), ("BF16", "bf16"), ("F32", "fp32")):
        path = write_gguf(tmp_path / f"{kind}.gguf", folder, kind)
        assert resolve(str(path), ["cpu"], UNSET_QUANT, "", tmp_path).quant.scheme == scheme


@pytest.mark.sample
def test_smollm2_is_kept_bit_for_bit(tmp_path: Path) -> None:
    """A real file: Q4_1 weights, and a Q8_0 embedding that is the head as well."""
    uri = "sample:smollm2-135m"
    graph, stored = _engine(uri, tmp_path)
    _require_same_values(uri, graph, stored)
    layouts = [w.layout for w in graph.weights.values() if len(w.shape) == 2]
    assert {layout: layouts.count(layout) for layout in layouts} == {
        "int8_group": 1,
        "int4_group": 120,
    }
    assert notes_of(graph) == (
        "Q4_1: 210 tensors kept exactly as int4_group 32",
        "Q8_0: 1 tensor kept exactly as int8_group 32",
    )
