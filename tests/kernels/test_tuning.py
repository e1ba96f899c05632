"""A tuning table changes what it names and nothing else, and names nothing that an engine lacks."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.gpu_models import MODELS, QUANTS, quantized_graph
from kernels.launch import Launch, MatMul
from kernels.lowering import lower, sites, variants
from kernels.regimes import REGIMES, Regime
from kernels.tuning import FUSED, LIBRARY, Site
from shared.arch import ARCHES
from tests.kernels.lowered_plans import digest

_ARCH = ARCHES["sm_90"]
# What was chosen before there were tables: after a change that is meant, print `digest` anew.
_BEFORE: dict[str, str] = json.loads(Path(__file__).with_name("lowered_plans.json").read_text())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("quant", QUANTS)
def test_without_a_table_every_choice_is_the_built_in_one(quant: str, model: str) -> None:
    """Kernels, tiles, splits, stages and grids of every regime, as they were before tables came."""
    found = {}
    for kv_cache in ("", "fp8"):
        graph = quantized_graph(MODELS[model], quant, 2, kv_cache=kv_cache)
        for arch in (ARCHES[name] for name in ("sm_80", "sm_86", "sm_90")):
            if arch.has_fp8 or not quant.startswith("fp8"):
                found[f"{model} {quant} {kv_cache} {arch.name}"] = digest(graph, arch)
    assert found == {name: _BEFORE[name] for name in found}


def _sites(quant: str, model: str = "llama-3.2-1b") -> dict[Site, tuple[str, ...]]:
    graph = quantized_graph(MODELS[model], quant, 2)
    found: dict[Site, tuple[str, ...]] = {}
    for regime in REGIMES:
        found |= sites(graph, _ARCH, regime)
    return found


@settings(max_examples=30, deadline=None)
@given(data=st.data(), quant=st.sampled_from(sorted(QUANTS)))
def test_every_table_stays_within_the_variants_of_the_engine(
    data: st.DataObject, quant: str
) -> None:
    """So a table needs no compiler: whatever it names of the candidates, together, is there."""
    graph = quantized_graph(MODELS["llama-3.2-1b"], quant, 2)
    found = _sites(quant)
    table = {site: data.draw(st.sampled_from(names)) for site, names in found.items()}
    regime = data.draw(st.sampled_from(REGIMES))
    there = variants(graph, _ARCH, with_candidates=True)
    used = {s.variant for s in lower(graph, _ARCH, regime, table) if isinstance(s, Launch)}
    assert used <= there, [v.key for v in used - there]


@pytest.mark.parametrize("quant", sorted(QUANTS))
def test_every_candidate_changes_the_plan(quant: str) -> None:
    """Two names of one plan would be measured twice, and told apart by noise."""
    graph = quantized_graph(MODELS["llama-3.2-1b"], quant, 2)
    for regime in REGIMES:
        for site, names in sites(graph, _ARCH, regime).items():
            plans = {
                tuple(
                    step.variant.key if isinstance(step, Launch) else step.weight
                    for step in lower(graph, _ARCH, regime, {site: name})
                )
                for name in names
            }
            assert len(plans) == len(names), f"{site}: {names}"


def test_a_table_moves_only_the_site_that_it_names() -> None:
    graph = quantized_graph(MODELS["llama-3.1-8b"], "fp8", 2)
    regime = Regime(1, 1)
    before = lower(graph, _ARCH, regime)
    for site, names in sites(graph, _ARCH, regime).items():
        after = lower(graph, _ARCH, regime, {site: names[-1]})
        for old, new in zip(before, after, strict=True):
            assert isinstance(old, Launch)
            assert isinstance(new, Launch)
            assert (old.variant == new.variant) == (old.site != site)


def test_a_name_that_is_no_candidate_changes_nothing() -> None:
    graph = quantized_graph(MODELS["llama-3.2-1b"], "bf16", 2)
    for regime in REGIMES:
        table = dict.fromkeys(sites(graph, _ARCH, regime), "m1 n3 k7 w1")
        before, after = lower(graph, _ARCH, regime), lower(graph, _ARCH, regime, table)
        keys = [
            [s.variant.key if isinstance(s, Launch) else s.weight for s in plan]
            for plan in (before, after)
        ]
        assert keys[0] == keys[1]


@pytest.mark.parametrize(("quant", "can"), [("bf16", True), ("fp8", True), ("int8", False)])
def test_few_tokens_may_go_through_the_library_where_it_knows_the_layout(
    quant: str, can: bool
) -> None:
    graph = quantized_graph(MODELS["llama-3.2-1b"], quant, 2)
    site, regime = Site("linears", 32), Regime(32, 32)
    assert (sites(graph, _ARCH, regime).get(site) == (FUSED, LIBRARY)) == can
    steps = lower(graph, _ARCH, regime, {site: LIBRARY})
    assert sum(isinstance(step, MatMul) for step in steps) == (9 if can else 0)


def test_candidates_are_few() -> None:
    """Each costs compile time in every build: within twice the built-in variants."""
    for quant in QUANTS:
        graph = quantized_graph(MODELS["llama-3.1-8b"], quant, 2)
        built_in, all_of_them = variants(graph, _ARCH), variants(graph, _ARCH, with_candidates=True)
        assert built_in < all_of_them
        assert len(all_of_them) <= 2 * len(built_in)


def test_sites_tell_apart_what_is_measured_apart() -> None:
    """Every shape of an 8B model has its own, and layers share theirs."""
    graph = quantized_graph(MODELS["llama-3.1-8b"], "bf16", 4)
    found = sites(graph, _ARCH, Regime(1, 1))
    assert len(found) == 6, "qkv, attention, o, gate_up, down, head"
    more = quantized_graph(MODELS["llama-3.1-8b"], "bf16", 8)
    assert sites(more, _ARCH, Regime(1, 1)) == found
    wide = replace(MODELS["llama-3.1-8b"], ffn=16384)
    assert sites(quantized_graph(wide, "bf16", 4), _ARCH, Regime(1, 1)) != found
