"""Which tuning table an engine runs by: the record that was measured on this kind of GPU, else the shipped one.

A record may be wrong, of another version, or somebody's mistake. It is only ever faster, so one that cannot be followed
is told once, in the log, and the engine runs as if there were none.
"""

from collections.abc import Iterable

import structlog

from kernels.launch import Launch
from kernels.launcher import KernelLibrary
from kernels.lowering import REGIMES, Regime, lower, sites
from kernels.shipped_tuning import SHIPPED
from kernels.tuning import Site, TuningTable
from shared.engine import EngineManifest
from shared.errors import BlobNotFound, DigestMismatch, TuningRefused
from shared.ir import Graph
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
    rows = {row.site: row.choice for row in SHIPPED.get(gpu, ())}
    table: dict[Site, str] = {}
    for regime in _regimes_of(rows):
        names = sites(graph, library.arch, regime)
        for site in rows.keys() & names.keys():
            row = {site: rows[site]}
            if not _problem(graph, library, (regime,), row):
                table |= row
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


def _regimes_of(rows: TuningTable) -> list[Regime]:
    """The regimes that may have these sites."""
    return [
        regime
        for regime in REGIMES
        if any(
            site.sequences == regime.max_sequences
            if site.sequences
            else site.tokens == regime.max_tokens
            for site in rows
        )
    ]
