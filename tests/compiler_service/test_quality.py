"""Quality: what is reported is what a whole run would say, and the gate keeps its promise."""

import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from compiler_service import builder
from compiler_service.calibration.text import calibration_digest, read_calibration_text
from compiler_service.calibration.windows import TextTokenizer, cut_windows
from compiler_service.checkpoints.digest import FileHashes
from compiler_service.checkpoints.sources import open_checkpoint
from compiler_service.progress import BuildProgress
from compiler_service.quality.gate import Kept, exceeded, fewest_kept
from compiler_service.quality.logits import LogitComparison
from compiler_service.quality.probe import Probe
from compiler_service.quality.report import Measurement, measurement_of
from compiler_service.weight_table import read_parts
from kernels.reference import dense, prompt_batch, run
from shared.engine import QuantConfig
from shared.errors import QualityGate
from shared.ir import Graph
from shared.store.local import LocalStore
from shared.store.weights import WeightReader
from tests.checkpoints import write_checkpoint
from tests.compiler_service.quantized_engines import (
    LOOSE,
    build_quantized,
    graph_of,
    report_of,
    softmax_kl,
)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.sets(st.integers(1, 39)), st.floats(0.1, 30.0))
def test_logits_in_slices_are_compared_as_whole_ones(
    seed: int, cuts: set[int], scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    reference_RV = torch.randn(5, 40, generator=generator) * scale
    quantized_RV = reference_RV + torch.randn(5, 40, generator=generator)
    following_R = torch.randint(0, 40, (5,), generator=generator)
    comparison = LogitComparison(following_R)
    edges = [0, *sorted(cuts), 40]
    for first, end in itertools.pairwise(edges):
        comparison.add(first, reference_RV[:, first:end], quantized_RV[:, first:end])
    found = comparison.finish()
    assert torch.allclose(found.kl_R, softmax_kl(reference_RV, quantized_RV), atol=2e-5, rtol=1e-4)
    for loss_R, logits_RV in (
        (found.reference_loss_R, reference_RV),
        (found.quantized_loss_R, quantized_RV),
    ):
        expected = torch.nn.functional.cross_entropy(
            logits_RV.double(), following_R, reduction="none"
        )
        assert torch.allclose(loss_R, expected, atol=2e-5)
    assert torch.equal(found.reference_top_R, reference_RV.argmax(1))
    assert torch.equal(found.quantized_top_R, quantized_RV.argmax(1))


def test_perplexity_beyond_all_numbers_is_infinite_and_fails_the_gate() -> None:
    """A loss of 710 nats and more has no exponential in fp64."""
    comparison = LogitComparison(torch.tensor([1]))
    comparison.add(0, torch.zeros(1, 2), torch.tensor([[900.0, 0.0]]))
    probe = Probe((torch.tensor([0]),), {}, (0,), torch.tensor([1]), 1, ())
    measurement = measurement_of(probe, comparison.finish(), ())
    assert measurement.perplexity_quantized == float("inf")
    quant = QuantConfig("int8", max_kl=1e9, max_perplexity_increase=1e9)
    assert "perplexity +inf%" in exceeded(measurement, quant)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
def test_report_says_what_a_whole_run_of_both_graphs_says(
    family: str, is_tied: bool, tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path / "tiny", family, tie_word_embeddings=is_tied)
    store, engine = build_quantized(folder, QuantConfig("int4", **LOOSE), tmp_path)
    graph, checkpoint = graph_of(store, engine), open_checkpoint(str(folder))
    documents = read_calibration_text("", engine.key.quant.calibration_digest)
    tokenizer = TextTokenizer(checkpoint.files, 320)
    windows = cut_windows(documents, tokenizer, 512, 0)
    with WeightReader(store, engine) as reader:
        stored = dense(graph, {name: reader.roles(name) for name in graph.weights})
    exact = {
        name: torch.cat(read_parts(checkpoint, weight)).float()
        for name, weight in graph.weights.items()
    }
    in_fp32 = replace(
        graph,
        nodes=tuple(
            replace(node, attrs={**node.attrs, "dtype": "float32"})
            if node.op == "embedding"
            else node
            for node in graph.nodes
        ),
    )
    tokens = torch.cat([window.token_ids for window in windows.measured]).int()
    lengths = [len(window.token_ids) for window in windows.measured]
    logits = [
        run(in_fp32, weights, tokens, prompt_batch(graph, lengths))["logits"]
        for weights in (exact, stored)
    ]
    kl = softmax_kl(*logits)
    report = report_of(store, engine)
    assert report["measured_tokens"] == len(kl) == 512
    assert report["kl"]["mean"] == pytest.approx(float(kl.mean()), rel=1e-3)
    assert report["kl"]["p99"] == pytest.approx(float(kl.quantile(0.99)), rel=1e-2)
    following = torch.cat([window.following for window in windows.measured])
    for name, found in zip(("unquantized", "quantized"), logits, strict=True):
        loss = torch.nn.functional.cross_entropy(found, following)
        assert report["perplexity"][name] == pytest.approx(float(loss.exp()), rel=1e-3)
    agreement = (logits[0].argmax(1) == logits[1].argmax(1)).double().mean()
    assert report["top1_agreement"] == pytest.approx(float(agreement), abs=0.005)


def test_every_weight_is_in_the_report_and_drift_grows_from_its_own_error(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    store, engine = build_quantized(folder, QuantConfig("int8"), tmp_path)
    weights = {w["weight"]: w for w in report_of(store, engine)["weights"]}
    assert list(weights) == [
        "embed",
        *(f"layers.{i}.{role}" for i in (0, 1) for role in ("qkv", "o", "gate_up", "down")),
        "lm_head",
    ]
    assert all(0.001 < w["error"] < 0.02 for w in weights.values())
    assert weights["layers.1.down"]["drift"] > 2 * weights["layers.1.down"]["error"]
    report = report_of(store, engine)
    ranked = sorted(weights, key=lambda name: weights[name]["impact"], reverse=True)
    assert report["worst"] == ranked[:8]


def test_embedding_alone_may_be_what_has_to_be_kept(tmp_path: Path) -> None:
    """A row with one value far beyond the others rounds these coarsely: half of all it loses."""
    folder = write_checkpoint(tmp_path / "tiny")
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    embedding[torch.arange(320), torch.arange(320) % 64] = 20 * embedding.std()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    store, engine = build_quantized(folder, QuantConfig("int8", **LOOSE), tmp_path)
    report = report_of(store, engine)
    assert report["worst"][0] == "embed"
    tied = write_checkpoint(tmp_path / "tied", tie_word_embeddings=True)
    store, engine = build_quantized(tied, QuantConfig("int8"), tmp_path)
    named = [weight["weight"] for weight in report_of(store, engine)["weights"]]
    assert named[-1] == "embed", "a head as well, which says what it costs"
    assert len(set(named)) == len(named)


def test_impact_is_the_error_times_what_the_block_adds(tmp_path: Path) -> None:
    """A block that writes less into the residual stream lowers the impact of its own weights alone."""
    shares = {}
    for name, factor in (("as it is", 1.0), ("quieter", 0.1)):
        folder = write_checkpoint(tmp_path / name.replace(" ", "-"))
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.1.mlp.down_proj.weight"] *= factor
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        store, engine = build_quantized(folder, QuantConfig("int8"), tmp_path)
        shares[name] = {
            w["weight"]: w["impact"] / w["error"] for w in report_of(store, engine)["weights"]
        }
    before, after = shares["as it is"], shares["quieter"]
    assert before["layers.1.gate_up"] == pytest.approx(before["layers.1.down"], rel=1e-3)
    assert after["layers.1.down"] < 0.3 * before["layers.1.down"]
    assert after["layers.1.o"] == pytest.approx(before["layers.1.o"], rel=1e-3)
    assert after["lm_head"] == before["lm_head"] == pytest.approx(1.0)


def test_kept_weights_are_plain_and_cost_next_to_nothing(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    everything = QuantConfig("int4", keep=("*",), **LOOSE)
    store, engine = build_quantized(folder, everything, tmp_path)
    assert {w.layout for w in graph_of(store, engine).weights.values()} == {"plain"}
    report = report_of(store, engine)
    assert report["kl"]["mean"] < 1e-3
    assert "layers.0.qkv" in report["kept"]
    some = QuantConfig("int4", keep=("layers.0.*", "model.layers.1.self_attn.k_proj"), **LOOSE)
    store, engine = build_quantized(folder, some, tmp_path)
    graph = graph_of(store, engine)
    kept = {name for name, w in graph.weights.items() if len(w.shape) == 2 and w.layout == "plain"}
    assert kept == {*(f"layers.0.{r}" for r in ("qkv", "o", "gate_up", "down")), "layers.1.qkv"}
    assert set(report_of(store, engine)["kept"]) == kept


def test_build_beyond_its_limits_fails_and_what_it_proposes_passes(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    store = LocalStore(tmp_path / "store")
    strict = QuantConfig("int4", max_kl=0.05, max_perplexity_increase=9.0)
    with pytest.raises(QualityGate) as failed:
        build_quantized(folder, strict, tmp_path, store)
    message = str(failed.value)
    assert "beyond 0.05; --keep layers." in message
    assert "worst layers: layers." in message
    assert "\n" not in message
    assert store.list() == ()
    proposed = _proposed(failed.value)
    _, engine = build_quantized(folder, replace(strict, keep=tuple(proposed)), tmp_path, store)
    report = report_of(store, engine)
    assert report["kl"]["mean"] <= 0.05
    assert report["kept"] == sorted(proposed)
    assert report["auto_kept"] == []


def _proposed(error: QualityGate) -> list[str]:
    """What the message says to keep, as people would copy it."""
    found = re.search(r"--keep (\S+) passes", str(error))
    assert found, error
    return found[1].split(",")


def test_proposal_goes_on_from_what_is_kept_already(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    strict = QuantConfig("int4", keep=("layers.1.*",), max_kl=0.03, max_perplexity_increase=9.0)
    with pytest.raises(QualityGate) as failed:
        build_quantized(folder, strict, tmp_path)
    proposed = _proposed(failed.value)
    assert proposed[0] == "layers.1.*"
    assert not any(name.startswith("layers.1.") for name in proposed[1:])
    build_quantized(folder, replace(strict, keep=tuple(proposed)), tmp_path)


@pytest.mark.parametrize("max_kl", [0.02, 0.05])
def test_without_any_one_of_what_auto_keep_keeps_the_gate_fails(
    max_kl: float, tmp_path: Path
) -> None:
    """Up to nine weights: each is needed, as builds that keep one less say."""
    folder = write_checkpoint(tmp_path / "tiny")
    quant = QuantConfig("int4", auto_keep=True, max_kl=max_kl, max_perplexity_increase=9.0)
    store, engine = build_quantized(folder, quant, tmp_path)
    kept = report_of(store, engine)["auto_kept"]
    assert 2 <= len(kept) <= 9
    for name in kept:
        others = tuple(other for other in kept if other != name)
        with pytest.raises(QualityGate):
            build_quantized(folder, replace(quant, auto_keep=False, keep=others), tmp_path)


def test_auto_keep_keeps_what_would_have_been_proposed_and_says_so(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    limits = {"max_kl": 0.05, "max_perplexity_increase": 9.0}
    with pytest.raises(QualityGate) as failed:
        build_quantized(folder, QuantConfig("int4", **limits), tmp_path)  # type: ignore[arg-type]
    quant = QuantConfig("int4", auto_keep=True, **limits)  # type: ignore[arg-type]
    seen: list[BuildProgress] = []
    store, engine = build_quantized(folder, quant, tmp_path, report=seen.append)
    fractions = [progress.fraction for progress in seen]
    assert fractions == sorted(fractions)
    assert sum(p.stage == "quality" for p in seen) > 10, "the search shows no progress"
    report = report_of(store, engine)
    assert report["kl"]["mean"] <= 0.05
    assert report["auto_kept"] == sorted(_proposed(failed.value))
    graph = graph_of(store, engine)
    assert {graph.weights[name].layout for name in report["auto_kept"]} == {"plain"}
    assert "int4_group" in {weight.layout for weight in graph.weights.values()}


def test_another_arch_gets_machine_code_for_the_weights_that_were_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers are adopted from an engine whose build kept more than its plan says."""
    folder = write_checkpoint(tmp_path / "tiny")
    store, engine = build_quantized(folder, QuantConfig("int8"), tmp_path)
    limit = 0.6 * report_of(store, engine)["kl"]["mean"]
    quant = QuantConfig("int8", max_kl=limit, auto_keep=True)
    _, engine = build_quantized(folder, quant, tmp_path, store)
    kept = report_of(store, engine)["auto_kept"]
    assert kept, "the limit was met without keeping anything"
    compiled: list[Graph] = []

    def machine_code(graph: Graph, *_: object) -> list[tuple[str, bytes]]:
        compiled.append(graph)
        return []

    monkeypatch.setattr(builder, "machine_code", machine_code)
    build_quantized(folder, quant, tmp_path, store, arch="sm_90")
    assert {compiled[0].weights[name].layout for name in kept} == {"plain"}


def test_nothing_is_measured_where_nothing_should_be(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    for quant in (QuantConfig("int4", skip_quality=True), QuantConfig("bf16")):
        _, engine = build_quantized(folder, quant, tmp_path)
        assert "quality.json" not in {blob.title for blob in engine.layers}
        assert engine.key.quant.calibration_digest == ""


def _measured(kl: float) -> Measurement:
    return Measurement(1, kl, kl, 1.0, 2.0, 2.0, (), ())


@given(st.integers(1, 40), st.integers(1, 50))
def test_fewest_weights_that_pass_are_found_and_each_claim_is_measured(
    count: int, needed: int
) -> None:
    ranked = [f"w{index}" for index in range(count)]
    asked: list[frozenset[str]] = []

    def measure(kept: frozenset[str]) -> Measurement:
        asked.append(kept)
        return _measured(0.0 if len(kept) >= needed else 1.0)

    found = fewest_kept(ranked, measure, lambda measurement: measurement.kl_mean == 0.0)
    if needed > count:
        assert found is None
    else:
        assert found == Kept(frozenset(ranked[:needed]), _measured(0.0))
        assert found.weights in asked
    assert len(asked) <= 2 * count.bit_length() + 1 + 8
    assert len(set(asked)) == len(asked), "a set was measured twice"


@given(st.integers(2, 9), st.data())
def test_no_weight_is_kept_that_the_limits_do_not_need(count: int, data: st.DataObject) -> None:
    """Ranks are estimates: what ranks high may cost nothing."""
    ranked = [f"w{index}" for index in range(count)]
    needed = frozenset(data.draw(st.sets(st.sampled_from(ranked), min_size=1)))
    found = fewest_kept(
        ranked, lambda kept: _measured(float(len(needed - kept))), lambda m: m.kl_mean == 0.0
    )
    assert found == Kept(needed, _measured(0.0))


@given(st.integers(1, 7), st.data())
def test_found_set_needs_each_weight_where_errors_cancel_each_other_too(
    count: int, data: st.DataObject
) -> None:
    """What passes need not pass with more kept, so a weight may become needless after another went."""
    ranked = [f"w{index}" for index in range(count)]
    sets = [frozenset(s) for n in range(1, count + 1) for s in itertools.combinations(ranked, n)]
    passing = set(data.draw(st.lists(st.sampled_from(sets)))) | {frozenset(ranked)}
    asked: list[frozenset[str]] = []

    def measure(kept: frozenset[str]) -> Measurement:
        asked.append(kept)
        return _measured(0.0 if kept in passing else 1.0)

    found = fewest_kept(ranked, measure, lambda measurement: measurement.kl_mean == 0.0)
    assert found is not None
    assert found.weights in passing
    for name in found.weights:
        less = found.weights - {name}
        assert less not in passing
        assert less in asked or not less, "it was never measured"
    assert len(set(asked)) == len(asked), "a set was measured twice"


def test_default_text_is_named_by_its_digest(tmp_path: Path) -> None:
    digest = calibration_digest("", FileHashes(tmp_path))
    assert calibration_digest("", FileHashes(tmp_path)) == digest
    (text,) = read_calibration_text("", digest)
    assert len(text) > 20_000
