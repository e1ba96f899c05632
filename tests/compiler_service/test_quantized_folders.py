"""Ready-made quantized checkpoints: values are those of the format's definition, kept as they are."""

import json
from pathlib import Path

import pytest
import structlog
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from compiler_service.checkpoints.digest import FileHashes, model_digest
from compiler_service.checkpoints.quantized_linear import int4_roles
from compiler_service.checkpoints.sources import open_checkpoint
from compiler_service.planning import plan
from compiler_service.quantization.as_is import notes_of
from compiler_service.resolve import resolve
from kernels.cpu_form import CpuTarget
from kernels.linear.layouts import LAYOUTS
from kernels.reference import dense, prompt_batch
from runtime_service.execution.cpu_executor import CpuExecutor
from shared.engine import EngineKey, EngineManifest, QuantConfig
from shared.errors import InvalidModel, UnsupportedQuant
from shared.ir import Graph
from shared.store.local import LocalStore
from shared.store.weights import WeightReader
from tests.checkpoints import edit_tensors, write_checkpoint
from tests.compiler_service.quantized_cases import (
    CASES,
    QUANT,
    UNSET_QUANT,
    UP,
    build_folder,
    write_case,
)
from tests.compiler_service.quantized_folders import (
    awq,
    compressed_packed,
    edit_settings,
    gptq,
    to_floats,
    write_quantized,
)

FP32 = CpuTarget(torch.float32, torch.float32, False, bool(torch._C._has_mkldnn), "")
EXACT = [case for case, (_, layout, _) in CASES.items() if layout]


def _stored(store: LocalStore, engine: EngineManifest, graph: Graph) -> dict[str, torch.Tensor]:
    with WeightReader(store, engine) as reader:
        return dense(graph, {name: reader.roles(name) for name in graph.weights})


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_the_definition(case: str, tmp_path: Path) -> None:
    """Bit for bit, dequantized and in our layout alike."""
    values = write_case(case, tmp_path / "m")
    _, layout, group_size = CASES[case]
    checkpoint = open_checkpoint(str(tmp_path / "m"))
    assert len(values) == 14
    for name, expected in values.items():
        info = checkpoint.tensors[name]
        assert info.shape == tuple(expected.shape)
        assert torch.equal(checkpoint.read(name), expected), name
        assert info.quantized is not None
        assert info.quantized.layout == layout
        if layout:
            packed = checkpoint.read_packed(name)
            assert torch.equal(LAYOUTS[layout].unpack(packed), expected), name
            found = {r: (tuple(t.shape), str(t.dtype)[6:]) for r, t in packed.items()}
            group = info.quantized.group_size
            assert found == LAYOUTS[layout].roles(info.shape, "float32", group)
    up = checkpoint.tensors[f"{UP}.weight"].quantized
    assert up is not None
    assert up.group_size == group_size


@pytest.mark.parametrize("case", EXACT)
def test_engine_keeps_what_the_checkpoint_has(case: str, tmp_path: Path) -> None:
    """Joined weights too: nothing is quantized again, whatever the scales are."""
    values = write_case(case, tmp_path / "m", family="qwen3")
    store, engine, graph = build_folder(tmp_path / "m", tmp_path)
    stored = _stored(store, engine, graph)
    checkpoint = open_checkpoint(str(tmp_path / "m"))
    for name, weight in graph.weights.items():
        expected = torch.cat([values.get(p, checkpoint.read(p)).float() for p in weight.parts])
        is_imported = set(weight.parts) <= set(values)
        assert (weight.layout == CASES[case][1]) == is_imported, name
        if not is_imported:
            expected = expected.bfloat16().float()
        assert torch.equal(stored[name], expected), name
    assert graph.weights["layers.0.qkv"].parts == tuple(
        f"model.layers.0.self_attn.{role}_proj.weight" for role in "qkv"
    )
    assert _told(graph, f" kept exactly as {CASES[case][1]}") == 14


@pytest.mark.parametrize("case", [case for case in CASES if case not in EXACT])
def test_engine_says_what_it_dequantized(case: str, tmp_path: Path) -> None:
    values = write_case(case, tmp_path / "m")
    store, engine, graph = build_folder(tmp_path / "m", tmp_path)
    stored = _stored(store, engine, graph)
    assert {weight.layout for weight in graph.weights.values()} == {"plain"}
    down = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(stored["layers.0.down"], values[down].bfloat16().float())
    assert _told(graph, " dequantized to bfloat16: no layout holds it") == 14


@pytest.mark.parametrize("case", ["AWQ", "GPTQ with act-order", "compressed FP8, tensors"])
def test_greedy_tokens_equal_those_of_the_dequantized_model(case: str, tmp_path: Path) -> None:
    """The built engine on the CPU executor, in fp32, against one of an unquantized folder."""
    values = write_case(case, tmp_path / "m")
    folder = tmp_path / "dense"
    write_checkpoint(folder, dtype=torch.float16, seed=5)
    tensors = load_file(folder / "model.safetensors")
    # What cannot be kept is rounded to bf16, as everything plain is.
    is_kept = case in EXACT
    tensors = {
        name: values[name] if name in values and is_kept
        else values.get(name, tensor).bfloat16().float()
        for name, tensor in tensors.items()
    }  # fmt: skip
    save_file(tensors, folder / "model.safetensors")
    greedy = []
    for source, quant in ((tmp_path / "m", QUANT), (folder, QuantConfig("fp32"))):
        store, engine, graph = build_folder(source, tmp_path / source.name, quant)
        with WeightReader(store, engine) as reader:
            executor = CpuExecutor(graph, reader.roles, FP32, num_blocks=2, block_tokens=16)
            tokens = [5, 9, 200]
            for _ in range(12):
                batch = prompt_batch(graph, [len(tokens)], logit_rows=[len(tokens) - 1])
                logits = executor.forward(torch.tensor(tokens, dtype=torch.int32), batch)
                tokens.append(int(logits.argmax()))
        greedy.append(tokens)
    assert greedy[0] == greedy[1]
    assert len(set(greedy[0])) > 4


def test_gptq_zero_points_of_zero_survive_the_older_format(tmp_path: Path) -> None:
    """GPTQModel takes 1 from whole words, so that a 0 borrows from its neighbour."""
    settings, one = gptq(symmetric=False, is_v2=True)

    def with_zeros(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        # Rows without negative values have zero point 0.
        return one(torch.where(torch.arange(len(weight))[:, None] % 3 == 0, weight.abs(), weight))

    values = write_quantized(tmp_path / "m", settings, with_zeros)
    zeros = load_file(tmp_path / "m" / "model.safetensors")[f"{UP}.qzeros"]
    assert bool(((zeros & 15) == 0).any())
    edit_tensors(
        tmp_path / "m",
        lambda t: [t[name].sub_(0x11111111) for name in t if name.endswith("qzeros")],
    )
    edit_settings(tmp_path / "m", checkpoint_format="gptq")
    checkpoint = open_checkpoint(str(tmp_path / "m"))
    for name, expected in values.items():
        assert torch.equal(checkpoint.read(name), expected), name


@given(
    bits=st.integers(0, 0x7BFF),
    is_bf16=st.booleans(),
    zero=st.integers(0, 16),
    code=st.integers(0, 15),
)
def test_zero_points_are_exact_in_our_layout(
    bits: int, is_bf16: bool, zero: int, code: int
) -> None:
    """(q - z) s = (q - 8) s + (8 - z) s, in fp32, for every finite scale of 16 bits."""
    dtype = torch.bfloat16 if is_bf16 else torch.float16
    scale = torch.tensor([[bits]], dtype=torch.int16).view(dtype).float()
    roles = int4_roles(
        torch.tensor([[code | code << 4]], dtype=torch.uint8), scale, torch.tensor([[zero]])
    )
    value = LAYOUTS["int4_group"].unpack(roles)
    assert torch.equal(value, (code - zero) * scale.expand(1, 2))


def test_head_that_was_not_quantized_stays_plain_and_one_that_was_is_kept(tmp_path: Path) -> None:
    for is_quantized, layout in ((False, "plain"), (True, "int4_group")):
        settings, one = awq()
        folder = tmp_path / str(is_quantized)
        write_quantized(folder, settings, one, quantizes_head=is_quantized)
        graph = plan(open_checkpoint(str(folder)), _key(), "tiny").graph
        assert graph.weights["lm_head"].layout == layout
        assert graph.weights["embed"].layout == "plain"


def test_layers_in_two_formats_are_each_kept(tmp_path: Path) -> None:
    """Mixed precision: attention in 8 bits, the MLP in 4."""
    eight, four = compressed_packed(8), compressed_packed(4)
    settings = four[0]
    settings["config_groups"]["group_1"] = eight[0]["config_groups"]["group_0"]
    write_quantized(tmp_path / "m", settings, lambda w: (eight if w.shape[0] <= 64 else four)[1](w))
    store, engine, graph = build_folder(tmp_path / "m", tmp_path)
    layouts = {name.split(".")[-1]: weight.layout for name, weight in graph.weights.items()}
    assert layouts["qkv"] == layouts["o"] == layouts["down"] == "int8_group"
    assert layouts["gate_up"] == "int4_group"
    assert set(_stored(store, engine, graph)) == set(graph.weights)
    assert len(notes_of(graph)) == 2


def test_parts_that_share_no_layout_are_dequantized_together(tmp_path: Path) -> None:
    settings, one = awq()
    write_quantized(tmp_path / "m", settings, one)
    # v alone is stored as floats, as some recipes leave it.
    edit_tensors(tmp_path / "m", lambda t: to_floats(t, "model.layers.0.self_attn.v_proj", one))
    _, _, graph = build_folder(tmp_path / "m", tmp_path)
    assert graph.weights["layers.0.qkv"].layout == "plain"
    assert graph.weights["layers.1.qkv"].layout == "int4_group"
    assert any(
        "2 tensors dequantized to bfloat16: it is joined with AWQ 4-bit, groups of 32, floats" in n
        for n in notes_of(graph)
    ), notes_of(graph)


@pytest.mark.parametrize("quant", [QuantConfig("int8"), QuantConfig("bf16")], ids=str)
def test_other_scheme_quantizes_again_and_says_so(quant: QuantConfig, tmp_path: Path) -> None:
    values = write_case("AWQ", tmp_path / "m")
    store, engine, graph = build_folder(tmp_path / "m", tmp_path, quant)
    stored = _stored(store, engine, graph)["layers.0.down"]
    original = values["model.layers.0.mlp.down_proj.weight"]
    assert float((stored - original).norm() / original.norm()) <= 0.012
    (note,) = notes_of(graph)
    assert "what AWQ 4-bit, groups of 32 lost stays lost (as-is keeps it as it is)" in note
    assert ("quantized again as int8_channel" in note) == (quant.scheme == "int8")


def test_build_logs_what_became_of_a_quantized_checkpoint(tmp_path: Path) -> None:
    """A fact where it is kept, a warning where it is quantized again."""
    write_case("AWQ", tmp_path / "m")
    for quant, level in ((QUANT, "info"), (QuantConfig("int8"), "warning")):
        with structlog.testing.capture_logs() as lines:
            _, engine, graph = build_folder(tmp_path / "m", tmp_path / level, quant)
        (line,) = [line for line in lines if line["event"] == "checkpoint_was_quantized"]
        assert line["log_level"] == level
        assert line["engine"] == engine.key.digest
        assert line["notes"] == notes_of(graph)


def test_unset_quant_keeps_a_quantized_checkpoint_as_it_is(tmp_path: Path) -> None:
    write_case("GPTQ", tmp_path / "m")
    assert resolve(str(tmp_path / "m"), ["cpu"], UNSET_QUANT, "", tmp_path).quant == QUANT


def test_as_is_is_refused_when_the_checkpoint_is_not_quantized(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m")
    with pytest.raises(UnsupportedQuant, match="the checkpoint is not quantized; ask for bf16"):
        resolve(str(folder), ["cpu"], QUANT, "", tmp_path)


def test_as_is_is_refused_where_an_arch_lacks_the_layout(tmp_path: Path) -> None:
    write_case("GPTQ 8-bit", tmp_path / "m")
    with pytest.raises(UnsupportedQuant, match=r"sm_90 has no kernel for int8_group.*GPTQ 8-bit"):
        resolve(str(tmp_path / "m"), ["sm_90"], QUANT, "", tmp_path)


@pytest.mark.parametrize("arch", ["sm_80", "sm_86"])
def test_fp8_checkpoint_is_refused_where_a_gpu_has_no_fp8(arch: str, tmp_path: Path) -> None:
    """While planning, with what to do; not when a kernel is compiled."""
    write_case("compressed FP8, channels", tmp_path / "m")
    with pytest.raises(UnsupportedQuant, match=f"{arch} has no kernel for fp8_channel.*or int8"):
        resolve(str(tmp_path / "m"), [arch], QUANT, "", tmp_path)


def test_fp8_checkpoint_is_kept_for_a_gpu(tmp_path: Path) -> None:
    write_case("compressed FP8, channels", tmp_path / "m")
    assert set(resolve(str(tmp_path / "m"), ["sm_90", "cpu"], QUANT, "", tmp_path).keys) == {
        "sm_90",
        "cpu",
    }


def test_old_folders_keep_their_settings_in_files_of_their_own(tmp_path: Path) -> None:
    """AutoGPTQ's quantize_config.json and AutoAWQ's quant_config.json; both count in the digest."""
    for (settings, one), file_name in (
        (gptq(), "quantize_config.json"),
        (awq(), "quant_config.json"),
    ):
        folder = tmp_path / file_name
        del settings["quant_method"]
        values = write_quantized(folder, settings, one, settings_file=file_name)
        checkpoint = open_checkpoint(str(folder))
        assert torch.equal(checkpoint.read(f"{UP}.weight"), values[f"{UP}.weight"])
        before = model_digest(checkpoint.digest_inputs, FileHashes(tmp_path))
        (folder / file_name).write_text(json.dumps({**settings, "damp_percent": 0.1}))
        changed = open_checkpoint(str(folder)).digest_inputs
        assert model_digest(changed, FileHashes(tmp_path)) != before


def test_key_changes_when_the_quantization_config_does(tmp_path: Path) -> None:
    write_case("GPTQ", tmp_path / "m")
    before = resolve(str(tmp_path / "m"), ["cpu"], QUANT, "", tmp_path).keys["cpu"]
    edit_settings(tmp_path / "m", checkpoint_format="gptq_v2")
    after = resolve(str(tmp_path / "m"), ["cpu"], QUANT, "", tmp_path).keys["cpu"]
    assert after.model_digest != before.model_digest


def test_biases_of_zeros_that_tools_add_are_left_out(tmp_path: Path) -> None:
    write_case("GPTQ", tmp_path / "m")
    bias = {f"{UP}.bias": torch.zeros(128, dtype=torch.float16)}
    edit_tensors(tmp_path / "m", lambda t: t.update(bias))
    plan(open_checkpoint(str(tmp_path / "m")), _key(), "tiny")
    edit_tensors(tmp_path / "m", lambda t: t[f"{UP}.bias"].fill_(1.0))
    with pytest.raises(InvalidModel, match=rf"tensor {UP}\.bias is left over"):
        plan(open_checkpoint(str(tmp_path / "m")), _key(), "tiny")


def test_biases_of_the_model_are_kept(tmp_path: Path) -> None:
    write_case("GPTQ", tmp_path / "m", family="qwen2")
    graph = plan(open_checkpoint(str(tmp_path / "m")), _key(), "tiny").graph
    assert graph.weights["layers.0.qkv.bias"].layout == "plain"
    assert graph.weights["layers.0.qkv"].layout == "int4_group"


def _told(graph: Graph, fate: str) -> int:
    """How many tensors the notes say that of."""
    return sum(int(n.split(": ")[1].split(" ")[0]) for n in notes_of(graph) if fate in n)


def _key() -> EngineKey:
    return EngineKey("0" * 64, "cpu", QUANT, "1-test")
