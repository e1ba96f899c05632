"""Which table an engine runs by: its record, where it can be followed; else the shipped one; never a failed start."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import structlog

from bench.gpu_models import MODELS, quantized_graph
from kernels.launch import Launch
from kernels.lowering import lower, sites, variants
from kernels.regimes import REGIMES, Regime
from kernels.shipped_tuning import SHIPPED
from kernels.tuning import Site
from kernels.variant import KernelVariant
from runtime_service.execution.tuned import tuning_table
from shared.arch import ARCHES, Arch
from shared.engine import EngineManifest
from shared.ir import Graph
from shared.store import LocalStore
from shared.tuning import TunedSite, TuningRecord, record_to_json
from tests.shared.engines import engine_key, publish_engine
from tests.shared.tunings import GPU, record_of

_ARCH = ARCHES["sm_90"]
_GRAPH = quantized_graph(MODELS["llama-3.2-1b"], "bf16", 2)
_H100 = "NVIDIA H100 80GB HBM3"


class Library:
    """The names of an engine's kernels."""

    def __init__(self, graph: Graph, arch: Arch = _ARCH, *, with_candidates: bool = True) -> None:
        self.arch = arch
        self._keys = {v.key for v in variants(graph, arch, with_candidates=with_candidates)}

    def __contains__(self, variant: KernelVariant) -> bool:
        return variant.key in self._keys


_LIBRARY = Library(_GRAPH)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """A store of a test's own."""
    return LocalStore(tmp_path)


def _rows(choose: Callable[[tuple[str, ...]], str]) -> tuple[TunedSite, ...]:
    found: Mapping[Site, tuple[str, ...]] = {
        site: names for regime in REGIMES for site, names in sites(_GRAPH, _ARCH, regime).items()
    }
    return tuple(
        TunedSite(
            op=s.op, tokens=s.tokens, sequences=s.sequences, n=s.n, k=s.k, dtype=s.dtype,
            layout=s.layout, rides=s.rides, built_in=names[0], built_in_us=2.0,
            choice=choose(names), choice_us=1.0,
        )
        for s, names in found.items()
    )  # fmt: skip


def _engine(store: LocalStore, record: Callable[[EngineManifest], bytes]) -> EngineManifest:
    engine = publish_engine(store, engine_key("sm_90"))
    return store.add_tuning(engine, GPU, record(engine))


def _table(
    store: LocalStore, engine: EngineManifest, gpu: str = GPU, library: Library = _LIBRARY
) -> tuple[Mapping[Site, str], list[Any]]:
    with structlog.testing.capture_logs() as lines:
        table = tuning_table(store, engine, _GRAPH, cast(Any, library), gpu)
    return table, lines


def test_record_of_this_gpu_is_followed(store: LocalStore) -> None:
    rows = _rows(lambda names: names[-1])
    engine = _engine(store, lambda e: record_to_json(record_of(e, sites=rows)))
    table, lines = _table(store, engine)
    assert len(table) == len(rows)
    assert [line["event"] for line in lines] == ["tuning_applied"]
    before, after = (lower(_GRAPH, _ARCH, Regime(1, 1), t) for t in ({}, table))
    changed = [
        (one, other)
        for one, other in zip(before, after, strict=True)
        if isinstance(one, Launch) and isinstance(other, Launch) and one.variant != other.variant
    ]
    assert len(changed) == 5 * 2 + 1, "five a layer, and the head"


def test_rows_that_keep_the_built_in_choice_change_nothing(store: LocalStore) -> None:
    rows = _rows(lambda names: names[0])
    engine = _engine(store, lambda e: record_to_json(record_of(e, sites=rows)))
    assert _table(store, engine)[0] == {}


def test_record_of_another_gpu_is_not_looked_at(store: LocalStore) -> None:
    engine = _engine(store, lambda e: b"not read")
    assert _table(store, engine, "NVIDIA Other") == ({}, [])


def _refused_records() -> dict[str, tuple[Callable[[EngineManifest], bytes], str]]:
    last = _rows(lambda names: names[-1])

    def changed(**fields: object) -> Callable[[EngineManifest], bytes]:
        row = msgspec.structs.replace(last[0], **fields)
        return lambda e: record_to_json(record_of(e, sites=(*last[1:], row)))

    def of(**fields: object) -> Callable[[EngineManifest], bytes]:
        return lambda e: record_to_json(
            msgspec.structs.replace(cast(TuningRecord, record_of(e, sites=last)), **fields)
        )

    return {
        "malformed": (lambda e: b"{", "malformed"),
        "of another engine": (of(engine="sha256:" + "0" * 64), "with the engine of manifest"),
        "of another GPU": (of(gpu="NVIDIA Other"), "measured on 'NVIDIA Other'"),
        "unknown candidate": (changed(choice="m1 n3 k5 w7"), "m1 n3 k5 w7 is not one of"),
        "unknown shape": (changed(n=77), "the engine has no choice at linear M<=1 77x"),
        "unknown op": (changed(op="norm"), "the engine has no choice at norm"),
    }


@pytest.mark.parametrize("what", _refused_records())
def test_record_that_cannot_be_followed_is_told_once_and_not_used(
    what: str, store: LocalStore
) -> None:
    record, problem = _refused_records()[what]
    table, lines = _table(store, _engine(store, record))
    assert table == {}
    (line,) = lines
    assert (line["event"], line["log_level"]) == ("tuning_refused", "warning")
    assert problem in line["problem"]
    assert "\n" not in line["problem"]


def test_record_whose_kernels_the_engine_lacks_is_refused(store: LocalStore) -> None:
    rows = _rows(lambda names: names[-1])
    engine = _engine(store, lambda e: record_to_json(record_of(e, sites=rows)))
    table, (line,) = _table(store, engine, library=Library(_GRAPH, with_candidates=False))
    assert table == {}
    assert "the engine holds no kernel for" in line["problem"]


def test_lost_record_is_told_and_not_used(store: LocalStore) -> None:
    engine = _engine(store, lambda e: record_to_json(record_of(e)))
    store.blob_path(engine.tunings[0].digest).unlink()
    table, (line,) = _table(store, engine)
    assert (table, line["event"]) == ({}, "tuning_refused")


@functools.cache
def _names() -> dict[Site, tuple[str, ...]]:
    """Every site of the models that are measured, and its candidates."""
    graphs = [
        quantized_graph(MODELS[model], quant, 2)
        for model in ("llama-3.1-8b", "llama-3.2-1b")
        for quant in ("bf16", "fp8", "int4")
    ]
    return {
        site: names
        for graph in graphs
        for regime in REGIMES
        for site, names in sites(graph, _ARCH, regime).items()
    }


def test_shipped_rows_name_candidates_of_the_models_that_they_were_measured_with() -> None:
    """And not the built-in choice: a row that changes nothing says nothing."""
    for rows in SHIPPED.values():
        for row in rows:
            assert row.choice in _names()[row.site][1:]
            assert "docs/BENCHMARKS.md" in row.measured


def test_shipped_table_holds_where_nothing_was_measured(store: LocalStore) -> None:
    graph = quantized_graph(MODELS["llama-3.1-8b"], "fp8", 2)
    engine = publish_engine(store, engine_key("sm_90"))

    def table(gpu: str, library: Library, of: Graph = graph) -> Mapping[Site, str]:
        return tuning_table(store, engine, of, cast(Any, library), gpu)

    def of_graph(of: Graph) -> Mapping[Site, str]:
        there = {site for regime in REGIMES for site in sites(of, _ARCH, regime)}
        return {row.site: row.choice for row in SHIPPED[_H100] if row.site in there}

    whole = Library(graph)
    assert of_graph(graph)
    assert table(_H100, whole) == of_graph(graph)
    assert table("NVIDIA H200", whole) == {}
    assert table(_H100, Library(graph, with_candidates=False)) == {}, "its engine lacks the kernel"
    assert table(_H100, _LIBRARY, _GRAPH) == of_graph(_GRAPH), "another model"
    deeper = replace(MODELS["llama-3.1-8b"], layers=3)
    assert table(_H100, Library(quantized_graph(deeper, "fp8")), quantized_graph(deeper, "fp8"))
