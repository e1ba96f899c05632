"""Schemes: what they do to a graph keeps its meaning, and what they choose beats rounding."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compiler_service import builder
from compiler_service.checkpoints.checkpoint import Checkpoint
from compiler_service.checkpoints.sources import open_checkpoint
from compiler_service.planning import plan
from compiler_service.quantization import SCHEMES, scheme_named
from compiler_service.quantization.int4_awq import prepare_pack as prepare_awq
from compiler_service.quantization.int4_gptq import prepare_pack as prepare_gptq
from compiler_service.quantization.rescale import fold_scales, scale_sources
from compiler_service.quantization.scheme import Adjustment
from compiler_service.resolve import resolve
from compiler_service.streaming import RowsOf, dense_rows
from compiler_service.weight_table import pack_weight, read_parts
from kernels.linear.layouts import LAYOUTS, pack_int4
from kernels.linear.op import multiplied
from kernels.reference import prompt_batch, run
from shared.arch import ARCHES
from shared.engine import QuantConfig
from shared.errors import InvalidModel, UnsupportedQuant
from shared.ir import Graph, Node
from shared.store.local import LocalStore
from tests.checkpoints import write_checkpoint
from tests.compiler_service.quantized_engines import (
    LOOSE,
    build_quantized,
    graph_of,
    report_of,
    write_uneven_checkpoint,
)

INT4 = ("int4-rtn", "int4-awq", "int4-gptq")


def _inputs(num_tokens: int, num_columns: int, seed: int = 0) -> torch.Tensor:
    """Correlated, with a few channels far larger than the rest."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(num_tokens, num_columns // 4, generator=generator)
    mixed = base @ torch.randn(num_columns // 4, num_columns, generator=generator)
    mixed += 0.3 * torch.randn(num_tokens, num_columns, generator=generator)
    mixed[:, ::17] *= 10
    return mixed


def _weight(num_rows: int = 24, num_columns: int = 128) -> torch.Tensor:
    return torch.randn(num_rows, num_columns, generator=torch.Generator().manual_seed(1)) * 0.05


def _output_error(packed: dict[str, torch.Tensor], weight: torch.Tensor, x: torch.Tensor) -> float:
    unpacked = LAYOUTS["int4_group"].unpack(packed)
    return float(((unpacked - weight) @ x.T).norm() / (weight @ x.T).norm())


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_gptq_costs_less_than_rounding_and_is_stored_alike(group_size: int) -> None:
    weight, x = _weight(), _inputs(512, 128)
    packed = prepare_gptq(group_size, x, None)(weight)
    roles = LAYOUTS["int4_group"].roles((24, 128), "bfloat16", group_size)
    found = {r: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for r, t in packed.items()}
    assert found == roles
    rounded = _output_error(pack_int4(weight, group_size), weight, x)
    assert _output_error(packed, weight, x) < 0.6 * rounded


def test_gptq_rounds_to_nearest_where_no_column_can_make_up_for_another() -> None:
    """With uncorrelated inputs of one size the Hessian is diagonal and nothing is passed on."""
    weight = _weight()
    packed = prepare_gptq(64, torch.eye(128), None)(weight)
    expected = pack_int4(weight, 64)
    for role, tensor in expected.items():
        assert torch.equal(packed[role], tensor), role


@pytest.mark.parametrize("num_tokens", [40, 512], ids=["fewer than columns", "more"])
@pytest.mark.parametrize("act_order", [True, False], ids=["act-order", "as stored"])
def test_gptq_chooses_what_the_paper_does(num_tokens: int, act_order: bool) -> None:
    """Levels are those of the inverse Hessian's factor, which is never made; a tie may go either way."""
    weight, x = _weight(), _inputs(num_tokens, 128)
    scheme = scheme_named(QuantConfig("int4-gptq", no_act_order=not act_order))
    assert scheme.prepare_pack is not None
    packed = scheme.prepare_pack(64, x, None)(weight)
    found = LAYOUTS["int4_group"].unpack(packed)
    order = x.square().sum(0).argsort(descending=True, stable=True)
    order = order if act_order else torch.arange(128)
    expected = _gptq_of_the_paper(weight, x, packed["scale"], packed["zero"], 64, order)
    steps = (found - expected).abs() / packed["scale"].repeat_interleave(64, 1)
    same_rows = (steps < 0.5).all(1)
    assert same_rows.float().mean() > 0.9, "a row is told apart by its first tie"


def _gptq_of_the_paper(
    weight_NK: torch.Tensor,
    x_TK: torch.Tensor,
    scale_NJ: torch.Tensor,
    zero_NJ: torch.Tensor,
    group_size: int,
    order: torch.Tensor,
) -> torch.Tensor:
    """Algorithm 1 over columns in some order, with static groups, in fp64."""
    x = x_TK[:, order].double()
    hessian = x.T @ x
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(order), dtype=torch.float64)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    left, rounded = weight_NK[:, order].double(), torch.empty(weight_NK.shape, dtype=torch.float64)
    for k, column in enumerate(order.tolist()):
        scale, zero = (t[:, column // group_size].double() for t in (scale_NJ, zero_NJ))
        levels = ((left[:, k] - zero) / scale).round().clamp(-8, 7)
        rounded[:, column] = levels * scale + zero
        error = (left[:, k] - rounded[:, column]) / factor[k, k]
        left[:, k + 1 :] -= error[:, None] * factor[k, k + 1 :]
    return rounded.float()


def test_gptq_takes_memory_for_one_matrix_of_its_columns() -> None:
    """For wide linears that matrix is most of a build's memory."""
    num_columns = 3072
    x = torch.randn(64, num_columns, generator=torch.Generator().manual_seed(0))
    prepare_gptq(64, x[:, :512].contiguous(), None)  # what LAPACK keeps for itself
    before = _resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what there is
    prepare_gptq(64, x, None)
    assert _resident_bytes("VmHWM") - before < 1.6 * 4 * num_columns**2


def _resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def test_gptq_takes_channels_that_are_always_zero() -> None:
    weight, x = _weight(), _inputs(64, 128)
    x[:, 5:40] = 0.0
    packed = prepare_gptq(64, x, None)(weight)
    assert torch.isfinite(LAYOUTS["int4_group"].unpack(packed)).all()
    assert _output_error(packed, weight, x) < _output_error(pack_int4(weight, 64), weight, x)


def test_rows_packed_by_gptq_in_pieces_are_the_same_bytes() -> None:
    weight, x = _weight(), _inputs(256, 128)
    pack = prepare_gptq(64, x, None)
    whole, pieces = pack(weight), [pack(part) for part in weight.split([5, 19])]
    for role, tensor in whole.items():
        assert torch.equal(torch.cat([piece[role] for piece in pieces]), tensor), role


def test_importance_lowers_the_error_that_counts() -> None:
    weight, x = _weight(200), _inputs(512, 128)
    importance = x.square().mean(0)
    weighted = LAYOUTS["int4_group"].unpack(prepare_awq(64, None, importance)(weight))
    even = LAYOUTS["int4_group"].unpack(pack_int4(weight, 64))

    def cost(unpacked: torch.Tensor) -> float:
        return float(((unpacked - weight).square() * importance).sum())

    assert cost(weighted) < cost(even)


def _planned(folder: Path, quant: QuantConfig, tmp_path: Path) -> Graph:
    resolved = resolve(str(folder), ["cpu"], quant, "", tmp_path)
    return plan(open_checkpoint(str(folder)), resolved.keys["cpu"], "tiny").graph


def _reader(folder: Path, graph: Graph) -> Callable[[str], RowsOf]:
    checkpoint = open_checkpoint(str(folder))
    return lambda name: dense_rows(read_parts(checkpoint, graph.weights[name]))


FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", ["int4-awq", "w8a8-int8"])
def test_scales_on_inputs_are_undone_exactly(scheme: str, family: str, tmp_path: Path) -> None:
    """Law 1 for what AWQ and SmoothQuant do before rounding: the graph's meaning stays."""
    folder = write_uneven_checkpoint(tmp_path / "tiny", family)
    quant = QuantConfig(scheme, 32 if scheme == "int4-awq" else 0)
    graph = _planned(folder, quant, tmp_path)
    calibrate = SCHEMES[scheme].calibrate
    assert calibrate is not None
    assert len(scale_sources(graph)) == 4 * 2, "all that are inside the layers"
    rows_of = _reader(folder, graph)
    texts = [torch.arange(3, 60), torch.arange(100, 140)]
    scales = calibrate(graph, texts, rows_of, lambda name: None)
    assert sum(found.scale_K is not None for found in scales.values()) >= 4
    adjustments = fold_scales(graph, scales)
    checkpoint = open_checkpoint(str(folder))
    plain = {n: replace(w, layout="plain", dtype="float32") for n, w in graph.weights.items()}
    exact = replace(
        graph,
        nodes=tuple(
            replace(node, attrs={n: v for n, v in node.attrs.items() if n != "activations"})
            for node in graph.nodes
        ),
    )
    logits = []
    for chosen in ({}, adjustments):
        weights = {
            name: pack_weight(w, read_parts(checkpoint, w), chosen.get(name, Adjustment()))[
                "weight"
            ].double()
            for name, w in plain.items()
        }
        tokens = torch.arange(7, 47).int()
        batch = prompt_batch(graph, [40], torch.float64)
        logits.append(run(exact, weights, tokens, batch)["logits"])
    assert torch.allclose(*logits, rtol=1e-5, atol=1e-4)
    norms = {n: a for n, a in adjustments.items() if n.endswith("norm")}
    assert norms, "no norm took up a scale"
    for name, adjustment in norms.items():
        packed = pack_weight(plain[name], read_parts(checkpoint, plain[name]), adjustment)
        gain = packed["weight"]
        assert torch.allclose(gain, gain.bfloat16().float(), rtol=1e-6), "bf16 would round it"


def test_weight_that_is_kept_takes_no_scale(tmp_path: Path) -> None:
    folder = write_uneven_checkpoint(tmp_path / "tiny")
    graph = _planned(folder, QuantConfig("int4-awq", 32), tmp_path)
    calibrate = SCHEMES["int4-awq"].calibrate
    assert calibrate is not None
    scales = calibrate(graph, [torch.arange(60)], _reader(folder, graph), lambda name: None)
    spared = replace(
        graph,
        weights={
            n: replace(w, layout="plain") if n == "layers.0.qkv" else w
            for n, w in graph.weights.items()
        },
    )
    before, after = fold_scales(graph, scales), fold_scales(spared, scales)
    assert {"layers.0.attn_norm"} <= before.keys() - after.keys()
    assert after.get("layers.0.qkv", Adjustment()).columns_K is None


@pytest.mark.parametrize("family", FAMILIES)
def test_calibrated_int4_is_nearer_to_the_model_than_rounding(family: str, tmp_path: Path) -> None:
    folder = write_uneven_checkpoint(tmp_path / "tiny", family)
    divergence = {}
    for scheme in INT4:
        quant = QuantConfig(scheme, 32, **LOOSE)
        store, engine = build_quantized(folder, quant, tmp_path)
        divergence[scheme] = report_of(store, engine)["kl"]["mean"]
    assert divergence["int4-awq"] < divergence["int4-rtn"]
    assert divergence["int4-gptq"] < divergence["int4-rtn"]


def test_smoothing_helps_rounded_activations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_uneven_checkpoint(tmp_path / "tiny")
    quant = QuantConfig("w8a8-int8", **LOOSE)
    store, engine = build_quantized(folder, quant, tmp_path)
    smooth = report_of(store, engine)["kl"]["mean"]
    rough = replace(SCHEMES["w8a8-int8"], calibrate=None)
    monkeypatch.setitem(SCHEMES, "w8a8-int8", rough)
    store, engine = build_quantized(folder, quant, tmp_path, LocalStore(tmp_path / "rough"))
    assert smooth < 0.9 * report_of(store, engine)["kl"]["mean"]


def test_only_quantized_linears_inside_the_layers_round_their_inputs(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    quant = QuantConfig("w8a8-int8", keep=("layers.0.*",))
    graph = _planned(folder, quant, tmp_path)
    rounding = {n.weights["weight"] for n in graph.nodes if n.attrs.get("activations") == "int8"}
    assert rounding == {f"layers.1.{role}" for role in ("qkv", "o", "gate_up", "down")}


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name != "as-is"])
def test_bad_weight_is_named_whatever_the_scheme(scheme: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][5, 7] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    arch = "sm_90" if scheme.startswith("fp8") else "cpu"
    with pytest.raises(InvalidModel, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN"):
        build_quantized(folder, QuantConfig(scheme), tmp_path, arch=arch)


@pytest.mark.parametrize("scheme", ["int4-awq", "int4-gptq", "w8a8-int8"])
def test_model_that_overflows_on_the_calibration_text_is_refused(
    scheme: str, tmp_path: Path
) -> None:
    """A finite weight can make what is none; no scale and no Hessian comes of it."""
    folder = write_checkpoint(tmp_path / "tiny")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1e37
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quant = QuantConfig(scheme, skip_quality=True)
    with pytest.raises(InvalidModel, match=r"layers\.0\.down reads NaN, infinity"):
        build_quantized(folder, quant, tmp_path)


@pytest.mark.parametrize("scheme", ["int4-awq", "w8a8-int8"])
def test_linear_that_reads_nothing_takes_no_scale_that_is_no_number(
    scheme: str, tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"].zero_()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    store, engine = build_quantized(folder, QuantConfig(scheme, **LOOSE), tmp_path)
    report = report_of(store, engine)
    assert report["kl"]["mean"] < 5.0
    assert {w["error"] for w in report["weights"] if w["weight"] == "layers.0.down"} == {0.0}


class _CountedCheckpoint:
    """The checkpoint, and how many bytes of what was read of it are in memory at once, at most."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._live_bytes = self.peak_bytes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)

    def read(self, name: str) -> torch.Tensor:
        array = self._checkpoint.read(name).numpy().copy()
        self._live_bytes += array.nbytes
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)
        weakref.finalize(array, self._freed, array.nbytes)
        return torch.from_numpy(array)

    def _freed(self, num_bytes: int) -> None:
        self._live_bytes -= num_bytes


@pytest.mark.parametrize("scheme", ["int8", "w8a8-int8", *INT4])
def test_model_is_calibrated_and_measured_a_node_at_a_time(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that one which is larger than the memory can be."""
    folder = write_checkpoint(tmp_path / "tiny", num_hidden_layers=8, num_key_value_heads=4)
    opened = _CountedCheckpoint(open_checkpoint(str(folder)))
    monkeypatch.setattr(builder, "open_checkpoint", lambda uri: opened)
    build_quantized(folder, QuantConfig(scheme, **LOOSE), tmp_path)
    weights = opened.tensors.values()
    largest = max(info.num_bytes for info in weights)
    assert largest <= opened.peak_bytes <= 1.25 * largest
    assert opened.peak_bytes < sum(info.num_bytes for info in weights) / 10


REFUSED = {
    "fp8 on sm_80": ("fp8", "sm_80", "sm_89, sm_90, sm_100, sm_120 can; on sm_80 take w8a8-int8"),
    "fp8-static on cpu": (
        "fp8-static",
        "cpu",
        "sm_89, sm_90, sm_100, sm_120 can; on cpu take w8a8-int8",
    ),
    "fp32 on a GPU": ("fp32", "sm_90", "cpu can; on sm_90 take bf16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arch_that_cannot_run_a_scheme_is_told_which_can_and_what_is_nearest(
    case: str, tmp_path: Path
) -> None:
    scheme, arch, told = REFUSED[case]
    folder = write_checkpoint(tmp_path / "tiny")
    with pytest.raises(UnsupportedQuant) as refused:
        resolve(str(folder), [arch], QuantConfig(scheme), "", tmp_path)
    assert f"{arch} cannot run it; {told}" in str(refused.value)


def test_model_that_no_group_divides_is_told_what_has_none(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny", hidden_size=80)
    with pytest.raises(UnsupportedQuant, match=r"80 columns.* do not divide; take int8"):
        resolve(str(folder), ["cpu"], QuantConfig("int4"), "", tmp_path)


@pytest.mark.parametrize("scheme", [*INT4, "w8a8-int8", "int8", "bf16"])
def test_scheme_runs_on_every_arch(scheme: str) -> None:
    assert all(SCHEMES[scheme].runs_on(arch) for arch in ARCHES.values())


def test_fp8_static_engine_holds_the_largest_input_of_every_linear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its measurement rounds inputs by just that scale; weights that are kept have none."""
    monkeypatch.setattr(builder, "machine_code", lambda *arguments: [])
    folder = write_uneven_checkpoint(tmp_path / "tiny")
    quant = QuantConfig("fp8-static", keep=("layers.0.o",), **LOOSE)
    store, engine = build_quantized(folder, quant, tmp_path, arch="sm_90")
    graph = graph_of(store, engine)
    found = {
        node.weights["weight"]: node.attrs["input_scale"]
        for node in graph.nodes
        if "input_scale" in node.attrs
    }
    inside = {f"layers.{i}.{role}" for i in (0, 1) for role in ("qkv", "o", "gate_up", "down")}
    assert found.keys() == inside - {"layers.0.o"}
    assert len(set(found.values())) == len(found)
    assert all(isinstance(scale, float) and scale > 0 for scale in found.values())
    errors = {weight["weight"]: weight["error"] for weight in report_of(store, engine)["weights"]}
    assert 0.01 < errors["layers.1.down"] < 0.1


def test_fp8_report_counts_the_rounding_of_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token with one value far beyond the others loses these: no error of weights alone shows it."""
    monkeypatch.setattr(builder, "machine_code", lambda *arguments: [])
    folder = write_checkpoint(tmp_path / "tiny")
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(
            "_proj.weight"
        ):  # e4m3 holds these exactly, whatever is rounded beside them
            tensor.copy_(tensor.sign() / 16)
        if name == "model.norm.weight":
            tensor[0] = 3e6
    tensors["lm_head.weight"] = tensors["lm_head.weight"].sign() / 64
    tensors["lm_head.weight"][:, 0] = 0.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    store, engine = build_quantized(folder, QuantConfig("fp8", **LOOSE), tmp_path, arch="sm_90")
    errors = {weight["weight"]: weight["error"] for weight in report_of(store, engine)["weights"]}
    assert 0.005 < errors.pop("layers.0.qkv") < 0.05, "e4m3 has 3 bits beside the first"
    assert errors["lm_head"] > 0.5


def test_fp8_static_input_is_rounded_and_clipped_by_its_scale() -> None:
    node = Node("linear", ("x",), ("y",), {}, {"activations": "fp8", "input_scale": 0.5})
    x = torch.tensor([[0.5, 8.6, -1e6, 0.0]])
    assert multiplied(node, x).tolist() == [[0.5, 9.0, -224.0, 0.0]]
