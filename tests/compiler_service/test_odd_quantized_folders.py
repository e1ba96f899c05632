"""Quantized checkpoints at the edges of their formats: read as their makers meant, or refused for the right reason."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from compiler_service.build_plan import BuildPlan
from compiler_service.checkpoints.quantized_linear import QuantizedLinear
from compiler_service.checkpoints.sources import open_checkpoint
from compiler_service.planning import plan
from compiler_service.quantization.as_is import AS_IS, notes_of
from compiler_service.weight_table import import_weight
from kernels.linear.layouts import LAYOUTS
from shared.engine import EngineKey, QuantConfig
from shared.errors import InvalidModel, UnsupportedModel
from tests.checkpoints import edit_tensors
from tests.compiler_service.quantized_cases import UP
from tests.compiler_service.quantized_folders import (
    awq,
    compressed_bytes,
    compressed_packed,
    edit_settings,
    gptq,
    write_quantized,
)


def _plan(folder: Path) -> BuildPlan:
    key = EngineKey("0" * 64, "cpu", QuantConfig(AS_IS), "1-test")
    return plan(open_checkpoint(str(folder)), key, "tiny")


def _require_values(folder: Path, values: dict[str, torch.Tensor]) -> None:
    """Whole and in their layout alike."""
    checkpoint = open_checkpoint(str(folder))
    for name, expected in values.items():
        assert torch.equal(checkpoint.read(name), expected), name
        stored = checkpoint.tensors[name].quantized
        assert stored is not None
        if stored.layout:
            packed = checkpoint.read_packed(name)
            assert torch.equal(LAYOUTS[stored.layout].unpack(packed), expected), name


# Layout and group size of a weight of that many columns in groups of 64.
RAGGED = [
    ("4-bit", gptq(group_size=64, symmetric=False), 96, "int4_group", 32),
    ("4-bit", gptq(group_size=64, symmetric=False), 80, "", 0),
    ("8-bit", gptq(8, group_size=64), 80, "int8_group", 16),
    ("act-order", gptq(group_size=64, act_order_seed=1), 96, "", 0),
]


@pytest.mark.parametrize(
    ("kind", "written", "num_columns", "layout", "group_size"),
    RAGGED,
    ids=[f"{kind} {num_columns}" for kind, _, num_columns, _, _ in RAGGED],
)
def test_gptq_group_that_is_shorter_than_the_others_is_read(
    kind: str, written: Any, num_columns: int, layout: str, group_size: int, tmp_path: Path
) -> None:
    values = write_quantized(tmp_path / "m", *written, hidden_size=num_columns)
    _require_values(tmp_path / "m", values)
    stored = open_checkpoint(str(tmp_path / "m")).tensors[f"{UP}.weight"].quantized
    assert stored is not None
    assert (stored.layout, stored.group_size) == (layout, group_size)
    last = f"groups of 64, the last of {num_columns - 64}"
    assert any(last in note for note in notes_of(_plan(tmp_path / "m").graph))


@pytest.mark.parametrize("symmetric", [True, False])
def test_group_indices_that_were_never_used_change_nothing(symmetric: bool, tmp_path: Path) -> None:
    """compressed-tensors reserves weight_g_idx as -1."""
    values = write_quantized(tmp_path / "m", *compressed_packed(symmetric=symmetric))
    edit_tensors(
        tmp_path / "m",
        lambda t: t.update(
            {
                name.replace("_shape", "_g_idx"): torch.full((int(t[name][1]),), -1).int()
                for name in list(t)
                if name.endswith("weight_shape")
            }
        ),
    )
    _require_values(tmp_path / "m", values)
    assert _plan(tmp_path / "m").graph.weights["layers.1.gate_up"].layout == "int4_group"


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_that_older_releases_did_not_pack_are_read(bits: int, tmp_path: Path) -> None:
    """int8 [N, J] around 0, and left out where all are 0."""
    settings, one = compressed_packed(bits, symmetric=False)
    even, odd = compressed_packed(bits)[1], one

    def older(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        if weight.shape[0] == 128:  # gate and up: as if all zero points came out as 0
            return even(weight)
        tensors, value = odd(weight)
        num_rows = len(weight)
        as_bytes = tensors["weight_zero_point"].T.contiguous().view(torch.uint8)
        fields = as_bytes if bits == 8 else torch.stack((as_bytes & 15, as_bytes >> 4), -1)
        zeros_JN = fields.flatten(1)[:, :num_rows].int() - 2 ** (bits - 1)
        return {**tensors, "weight_zero_point": zeros_JN.T.to(torch.int8)}, value

    values = write_quantized(tmp_path / "m", settings, older)
    assert f"{UP}.weight_zero_point" not in load_file(tmp_path / "m" / "model.safetensors")
    _require_values(tmp_path / "m", values)
    _plan(tmp_path / "m")


@pytest.mark.parametrize(
    "written",
    [
        gptq(symmetric=False, scale_dtype=torch.float32),
        compressed_packed(symmetric=False, scale_dtype=torch.float32),
    ],
    ids=["GPTQ", "compressed"],
)
def test_zero_points_with_fp32_scales_are_dequantized_and_said_so(
    written: Any, tmp_path: Path
) -> None:
    """(8 - z) * scale is not exact for them, so nothing may say that they are kept exactly."""
    values = write_quantized(tmp_path / "m", *written)
    _require_values(tmp_path / "m", values)
    graph = _plan(tmp_path / "m").graph
    assert {weight.layout for weight in graph.weights.values()} == {"plain"}
    assert all("fp32 scales" in n and "dequantized" in n for n in notes_of(graph))


def test_gptq_matrix_without_columns_is_refused(tmp_path: Path) -> None:
    write_quantized(tmp_path / "m", *gptq())
    empty = {"qweight": torch.zeros(0, 128).int(), "g_idx": torch.zeros(0).int()}
    edit_tensors(tmp_path / "m", lambda t: t.update({f"{UP}.{r}": e for r, e in empty.items()}))
    with pytest.raises(InvalidModel, match=r"up_proj\.qweight has shape \[0, 128\]"):
        open_checkpoint(str(tmp_path / "m"))


def test_packed_weight_without_words_is_invalid(tmp_path: Path) -> None:
    write_quantized(tmp_path / "m", *compressed_packed())
    edit_tensors(
        tmp_path / "m", lambda t: t.update({f"{UP}.weight_packed": torch.zeros(128, 0).int()})
    )
    with pytest.raises(InvalidModel, match=r"weight_packed has shape \[128, 0\]"):
        open_checkpoint(str(tmp_path / "m"))


def test_zero_points_of_whole_bytes_are_not_supported(tmp_path: Path) -> None:
    """The checkpoint is good; it is we who hold no such thing."""
    write_quantized(tmp_path / "m", *compressed_bytes(torch.int8))
    zeros = {f"{UP}.weight_zero_point": torch.ones(128, 1, dtype=torch.int8)}
    edit_tensors(tmp_path / "m", lambda t: t.update(zeros))
    with pytest.raises(UnsupportedModel, match=r"with zero points.*up_proj.*symmetric"):
        open_checkpoint(str(tmp_path / "m"))


def test_group_that_quantizes_no_weights_is_skipped(tmp_path: Path) -> None:
    settings, one = compressed_packed()
    kv_group = {"targets": ["re:.*k_proj"], "weights": None, "output_activations": {"num_bits": 8}}
    groups = {"group_1": kv_group, **settings["config_groups"]}
    values = write_quantized(tmp_path / "m", {**settings, "config_groups": groups}, one)
    _require_values(tmp_path / "m", values)
    edit_settings(tmp_path / "m", config_groups={"group_1": kv_group})
    with pytest.raises(InvalidModel, match="no group that quantizes weights"):
        open_checkpoint(str(tmp_path / "m"))


@pytest.mark.parametrize("role", ["q", "k", "v"])
def test_zero_points_of_the_kv_cache_are_left_out(role: str, tmp_path: Path) -> None:
    write_quantized(tmp_path / "m", *compressed_packed())
    name = f"model.layers.0.self_attn.{role}_zero_point"
    edit_tensors(tmp_path / "m", lambda t: t.update({name: torch.zeros(1)}))
    assert name not in open_checkpoint(str(tmp_path / "m")).tensors
    _plan(tmp_path / "m")


def test_gptq_rules_may_leave_layers_alone_and_no_more(tmp_path: Path) -> None:
    settings, one = gptq()
    write_quantized(tmp_path / "m", {**settings, "dynamic": {r"-:.*lm_head.*": {}}}, one)
    assert _plan(tmp_path / "m").graph.weights["lm_head"].layout == "plain"
    for rule in (r"+:.*down_proj.*", r".*down_proj.*"):
        edit_settings(tmp_path / "m", dynamic={r"-:.*lm_head.*": {}, rule: {"bits": 8}})
        with pytest.raises(UnsupportedModel, match="dynamic bits per layer"):
            open_checkpoint(str(tmp_path / "m"))


@pytest.mark.parametrize("field", ["checkpoint_format", "format"])
def test_gptq_zero_points_are_read_as_either_field_says(field: str, tmp_path: Path) -> None:
    """The two formats differ by one in every zero point; GPTQModel knows both names of the field."""
    settings, one = gptq(symmetric=False, is_v2=True)
    folder = tmp_path / "m"
    settings[field] = settings.pop("checkpoint_format")
    _require_values(folder, write_quantized(folder, settings, one))
    edit_settings(folder, **{field: "marlin"})
    with pytest.raises(UnsupportedModel, match="GPTQ packed as marlin"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("field", ["version", "checkpoint_format", "format"])
def test_awq_that_is_not_packed_for_gemm_is_refused(field: str, tmp_path: Path) -> None:
    settings, one = awq()
    write_quantized(tmp_path / "m", {**settings, field: "gemv"}, one)
    with pytest.raises(UnsupportedModel, match="AWQ version gemv"):
        open_checkpoint(str(tmp_path / "m"))


def test_layers_that_a_pattern_ignores_stay_as_they_are(tmp_path: Path) -> None:
    """What is quantized follows from the tensors; llm-compressor's `ignore` may be patterns."""
    settings, one = compressed_packed(symmetric=False)
    ignore = ["re:.*lm_head", r"re:.*layers\.\d+\.mlp\.down_proj$"]

    def ignoring(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        return ({"weight": weight}, weight) if weight.shape == (64, 128) else one(weight)

    values = write_quantized(tmp_path / "m", {**settings, "ignore": ignore}, ignoring)
    checkpoint, graph = open_checkpoint(str(tmp_path / "m")), _plan(tmp_path / "m").graph
    layouts = {name.split(".")[-1]: weight.layout for name, weight in graph.weights.items()}
    assert layouts["down"] == layouts["lm_head"] == "plain"
    assert layouts["qkv"] == layouts["gate_up"] == "int4_group"
    for name, expected in values.items():
        assert torch.equal(checkpoint.read(name), expected), name


def test_blocks_of_fp8_are_refused_by_their_name(tmp_path: Path) -> None:
    """As DeepSeek's and Qwen's own FP8 checkpoints are: a scale for 128 x 128 values."""
    _, one = compressed_bytes(torch.float8_e4m3fn)

    def in_blocks(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        blocks = [-(-size // 128) for size in weight.shape]
        return {"weight": one(weight)[0]["weight"], "weight_scale_inv": torch.ones(blocks)}, weight

    settings = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    write_quantized(tmp_path / "m", settings, in_blocks)
    with pytest.raises(UnsupportedModel, match="'quantized by fp8 in blocks of 128 x 128'"):
        open_checkpoint(str(tmp_path / "m"))
    edit_settings(tmp_path / "m", weight_block_size=None)
    with pytest.raises(UnsupportedModel, match=r"'quantized by fp8' is not supported; .*awq"):
        open_checkpoint(str(tmp_path / "m"))


def _transforms(*places: str) -> dict[str, Any]:
    steps = [{"targets": ["Linear"], "location": place} for place in places]
    return {"config_groups": {"R": {"type": "hadamard", "apply": steps}}}


@pytest.mark.parametrize("place", ["input", "output", "q_attn", "k_cache"])
def test_rotations_that_a_running_model_has_to_make_are_refused(place: str, tmp_path: Path) -> None:
    """Without them the weights are those of no model; those in stored weights alone change nothing."""
    settings, one = compressed_packed()
    merged = _transforms("weight_input", "weight_output")
    values = write_quantized(tmp_path / "m", {**settings, "transform_config": merged}, one)
    _require_values(tmp_path / "m", values)
    for config in (_transforms("weight_input", place), {"rotates": True}, "quip"):
        edit_settings(tmp_path / "m", transform_config=config)
        with pytest.raises(UnsupportedModel, match="with a transform of"):
            open_checkpoint(str(tmp_path / "m"))


class _Watch(TorchDispatchMode):
    """Operations by name and dtype of their first tensor; bytes of the storages that they gave."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: set[tuple[str, torch.dtype | None]] = set()
        self.num_bytes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func).split(".")[1]
        self.operations.add((name, args[0].dtype if isinstance(args[0], torch.Tensor) else None))
        if isinstance(result, torch.Tensor):
            storage = result.untyped_storage()
            self.num_bytes[storage.data_ptr()] = storage.nbytes()
        return result


def test_reading_int4_needs_little_beside_its_result() -> None:
    shape = (4096, 2048)
    packed = LAYOUTS["int4_group"].pack(torch.randn(shape), 64)
    linear = QuantizedLinear(shape, "4-bit", {}, "int4_group", 64, lambda read: packed)
    with _Watch() as watch:
        values = linear.read(lambda name: torch.empty(0))
    assert torch.equal(values, LAYOUTS["int4_group"].unpack(packed))
    assert [n for n in watch.num_bytes.values() if n > values.nbytes // 4] == [values.nbytes]


def test_a_single_part_is_imported_without_a_copy_or_a_search_of_its_codes(tmp_path: Path) -> None:
    """A search is for NaN and infinity, which integers cannot be."""
    write_quantized(tmp_path / "m", *compressed_packed(8))
    checkpoint = open_checkpoint(str(tmp_path / "m"))
    weight = _plan(tmp_path / "m").graph.weights["layers.0.down"]
    with _Watch() as watch:
        import_weight(checkpoint, weight)
    assert {dtype for name, dtype in watch.operations if name == "aminmax"} == {torch.float32}
    assert "cat" not in {name for name, _ in watch.operations}
