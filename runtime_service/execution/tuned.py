"""Which tuning table an engine runs by: the record that was measured on this kind of GPU, else the shipped one.

A record may be wrong, of another version, or somebody's mistake. It is only ever faster, so one that cannot be followed
is told once, in the log, and the engine runs as if there were none.
"""

from collections.abc import Iterable

import structlog

from kernels.launch import Launch
from kernels.launcher import KernelLibrary
from kernels.lowering import lower, sites
from kernels.regimes import REGIMES, Regime
from kernels.shipped_tuning import SHIPPED
from kernels.tuning import Site, TuningTable
from shared.engine import EngineManifest
from shared.errors import BlobNotFound, DigestMismatch, TuningRefused
from shared.ir import Graph, Node
from shared.store.local import LocalStore
from shared.tuning import TunedSite, TuningRecord, record_from_json

_log = structlog.get_logger()


def tuning_table(
    store: LocalStore, engine: EngineManifest, graph: Graph, library: KernelLibrary, gpu: str
) -> TuningTable:
    """What takes the place of built-in choices; every kernel that it names is in `library`.

    Args:
        gpu: the device's name, as its driver gives it.
    """
    for blob in engine.tunings:
        if blob.title != gpu:
            continue
        try:
            text = store.read_all(blob.digest)
            record = record_from_json(text, gpu=gpu, engine=engine.manifest.digest)
            table = table_of(record, graph, library)
        except (TuningRefused, BlobNotFound, DigestMismatch) as error:
            _log.warning("tuning_refused", engine=engine.name, gpu=gpu, problem=str(error))
            break
        _log.info(
            "tuning_applied", engine=engine.name, gpu=gpu, sites=len(table),
            measured_at=record.measured_at,
        )  # fmt: skip
        return table
    return shipped_table(graph, library, gpu)


def table_of(record: TuningRecord, graph: Graph, library: KernelLibrary) -> TuningTable:
    """What a record changes.

    Raises:
        TuningRefused: it names a site, a candidate or a kernel that the engine has not.
    """
    named = {site_of(row): row.choice for row in record.sites}
    built_in = {site_of(row): row.built_in for row in record.sites}
    problem = _problem(graph, library, REGIMES, named)
    if problem:
        raise TuningRefused(gpu=record.gpu, problem=problem)
    return {site: choice for site, choice in named.items() if choice != built_in[site]}


def shipped_table(graph: Graph, library: KernelLibrary, gpu: str) -> TuningTable:
    """The shipped table's rows that this engine can follow."""
    sizes = _sizes(graph)
    rows = {r.site: r.choice for r in SHIPPED.get(gpu, ()) if (r.site.n, r.site.k) in sizes}
    table: dict[Site, str] = {}
    for regime in REGIMES:
        left = {s: name for s, name in rows.items() if s not in table and _may_have(regime, s)}
        if not left:
            continue  # a start waits for this: a lowering takes 20 ms
        names = sites(graph, library.arch, regime)
        found = {site: name for site, name in left.items() if name in names.get(site, ())}
        lacking = {
            step.site
            for step in lower(graph, library.arch, regime, found)
            if isinstance(step, Launch) and step.variant not in library
        }
        table |= {site: name for site, name in found.items() if site not in lacking}
    return table


def site_of(row: TunedSite) -> Site:
    """The site that a record's row is of."""
    return Site(
        row.op, row.tokens, row.sequences, row.n, row.k, row.dtype, row.layout, row.rides
    )  # fmt: skip


def _problem(
    graph: Graph, library: KernelLibrary, regimes: Iterable[Regime], table: TuningTable
) -> str:
    """Why steps of these regimes cannot run by `table`, in a few words; "" where they can."""
    seen: dict[Site, tuple[str, ...]] = {}
    for regime in regimes:
        seen |= sites(graph, library.arch, regime)
        for step in lower(graph, library.arch, regime, table):
            name = table.get(step.site) if isinstance(step, Launch) and step.site else None
            if isinstance(step, Launch) and name and step.variant not in library:
                return f"the engine holds no kernel for {name} at {step.site}"
    for site, name in table.items():
        if site not in seen:
            return f"the engine has no choice at {site}"
        if name not in seen[site]:
            return f"{name} is not one of {', '.join(seen[site])} at {site}"
    return ""


def _may_have(regime: Regime, site: Site) -> bool:
    if site.sequences:
        return site.sequences == regime.max_sequences
    return site.tokens == regime.max_tokens


def _sizes(graph: Graph) -> set[tuple[int, ...]]:
    """(n, k) of whatever a site of this graph can be of."""

    def width(node: Node, heads: str) -> int:
        return int(str(node.attrs[heads])) * int(str(node.attrs["head_dim"]))

    attention = [node for node in graph.nodes if node.op == "attention"]
    widths = {(width(node, "num_heads"), width(node, "num_kv_heads")) for node in attention}
    return widths | {spec.shape for spec in graph.weights.values()}
