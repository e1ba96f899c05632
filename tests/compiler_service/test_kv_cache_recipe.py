"""A build may keep keys and values in 8 bits: it says so in its key, measures what that costs, and runs."""

from dataclasses import replace
from pathlib import Path

import pytest

from compiler_service.resolve import resolve
from shared.engine import QuantConfig
from shared.errors import QualityGate, UnsupportedQuant
from tests.checkpoints import write_checkpoint
from tests.compiler_service.quantized_engines import LOOSE, build_quantized, graph_of, report_of

BF16 = QuantConfig("bf16")


@pytest.mark.parametrize("kv_cache", ["fp8", "int8"])
def test_cost_of_the_cache_alone_is_measured(kv_cache: str, tmp_path: Path) -> None:
    """No weight loses anything, so all that the report finds is the cache's."""
    folder = write_checkpoint(tmp_path / "tiny")
    quant = QuantConfig("fp32", kv_cache=kv_cache, **LOOSE)
    store, engine = build_quantized(folder, quant, tmp_path)
    assert engine.key.quant.kv_cache == kv_cache
    assert graph_of(store, engine).config["kv_cache"] == kv_cache
    report = report_of(store, engine)
    assert report["kv_cache"] == kv_cache
    assert 0 < report["kl"]["mean"] < 0.05
    assert all(weight["error"] < 1e-6 for weight in report["weights"])
    assert any(weight["drift"] > 1e-4 for weight in report["weights"])
    assert report["worst"] == []


def test_integers_cost_less_than_floats_with_as_many_bits(tmp_path: Path) -> None:
    """e4m3 spends bits on exponents that a scale for each head makes needless."""
    folder, cost = write_checkpoint(tmp_path / "tiny"), {}
    for kv_cache in ("fp8", "int8"):
        quant = QuantConfig("fp32", kv_cache=kv_cache, **LOOSE)
        store, engine = build_quantized(folder, quant, tmp_path)
        cost[kv_cache] = report_of(store, engine)["kl"]["mean"]
    assert cost["int8"] < cost["fp8"]


def test_cache_adds_to_what_weights_cost(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    drift = {}
    for kv_cache in ("", "fp8"):
        quant = QuantConfig("int8", kv_cache=kv_cache, **LOOSE)
        store, engine = build_quantized(folder, quant, tmp_path)
        weights = {w["weight"]: w for w in report_of(store, engine)["weights"]}
        drift[kv_cache] = weights["layers.0.o"]["drift"]
    assert drift["fp8"] > 1.2 * drift[""]


def test_cache_beyond_the_limits_fails_the_build_and_says_what_to_leave_out(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    quant = replace(BF16, kv_cache="fp8", max_kl=1e-9)
    with pytest.raises(
        QualityGate, match=r"leave out --kv-cache; worst layers: none, as no weight is"
    ):
        build_quantized(folder, quant, tmp_path)


REFUSED = {
    "unknown format": (replace(BF16, kv_cache="fp4"), "fp8, int8"),
    "weights to keep": (replace(BF16, kv_cache="fp8", keep=("lm_head",)), "quantizes no weights"),
    "weights to find": (replace(BF16, kv_cache="fp8", auto_keep=True), "quantizes no weights"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_recipe_that_cannot_be_is_refused(name: str, tmp_path: Path) -> None:
    quant, what = REFUSED[name]
    folder = write_checkpoint(tmp_path / "tiny")
    with pytest.raises(UnsupportedQuant, match=what):
        resolve(str(folder), ["cpu"], quant, "", tmp_path)
