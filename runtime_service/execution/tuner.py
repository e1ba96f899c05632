"""Which candidate of each site is fastest on this GPU: what to time, and what counts as faster.

A site's launches are timed alone, in the largest kind of step that has them, each candidate and the built-in choice
before and after them. The fastest has to win by more than noise, and then not to make the whole step slower: alone, a
kernel may look better that keeps the next one's programs out. So the built-in choice stays unless something is better
for sure. How time is taken is not known here.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from kernels.lowering import sites
from kernels.regimes import REGIMES, Regime
from kernels.tuning import LIBRARY, Site, TuningTable
from shared.arch import Arch
from shared.ir import Graph
from shared.tuning import TunedSite

# What a candidate has to win; beyond it, as much as readings of one thing differ.
LEAST_GAIN = 0.02


@dataclass(frozen=True, slots=True)
class Timing:
    """Readings of one thing, in microseconds."""

    median_us: float
    spread_us: float

    @staticmethod
    def of(readings_us: Sequence[float]) -> "Timing":
        """The median, and between which the middle half of the readings lie."""
        low, median, high = statistics.quantiles(readings_us, n=4, method="inclusive")
        return Timing(median, high - low)


class Measurer(Protocol):
    """Times steps on a device."""

    def time(self, regime: Regime, table: TuningTable, site: Site | None) -> Timing:
        """What one step of a regime takes by a table: all of it, or only what `site` launches."""


def tune(
    graph: Graph, arch: Arch, measurer: Measurer, on_site: Callable[[TunedSite], None]
) -> tuple[TunedSite, ...]:
    """Every site's choice, in the order in which they were measured.

    Args:
        on_site: called with each as it is known.
    """
    table: dict[Site, str] = {}
    found = []
    for regime, site, names in _in_order(graph, arch):
        measure = _compare_steps if LIBRARY in names else _compare
        row = measure(measurer, regime, table, site, names)
        if row.choice != row.built_in:
            table[site] = row.choice
        found.append(row)
        on_site(row)
    return tuple(found)


def _in_order(graph: Graph, arch: Arch) -> Iterator[tuple[Regime, Site, tuple[str, ...]]]:
    """Each site once, with the largest step that has it; the library's products when ours are tuned."""
    seen: set[Site] = set()
    late: list[tuple[Regime, Site, tuple[str, ...]]] = []
    decode = [regime for regime in REGIMES if regime.max_sequences]
    ragged = [regime for regime in REGIMES if not regime.max_sequences]
    for regime in (*reversed(decode), *reversed(ragged)):
        for site, names in sites(graph, arch, regime).items():
            if site in seen:
                continue
            seen.add(site)
            if LIBRARY in names:
                late.append((regime, site, names))
            else:
                yield regime, site, names
    yield from late


def _compare(
    measurer: Measurer, regime: Regime, table: TuningTable, site: Site, names: tuple[str, ...]
) -> TunedSite:
    built_in = names[0]
    timings = {name: measurer.time(regime, {**table, site: name}, site) for name in names}
    again = measurer.time(regime, {**table, site: built_in}, site)
    best = min(names[1:], key=lambda name: timings[name].median_us)
    # What drifted while the candidates ran is noise as well.
    before = _both(timings[built_in], again)
    choice = best if _is_faster(timings[best], before) else built_in
    if choice != built_in and not _keeps_the_step(measurer, regime, table, site, choice):
        choice = built_in
    after = before if choice == built_in else timings[choice]
    return _row(site, built_in, before, choice, after)


def _compare_steps(
    measurer: Measurer, regime: Regime, table: TuningTable, site: Site, names: tuple[str, ...]
) -> TunedSite:
    """Whole steps: what rides on our linears takes launches of its own where they are the library's."""
    built_in, other = names
    first = measurer.time(regime, table, None)
    after = measurer.time(regime, {**table, site: other}, None)
    before = _both(first, measurer.time(regime, table, None))
    if _is_faster(after, before):
        return _row(site, built_in, before, other, after)
    return _row(site, built_in, before, built_in, before)


def _keeps_the_step(
    measurer: Measurer, regime: Regime, table: TuningTable, site: Site, choice: str
) -> bool:
    first = measurer.time(regime, table, None)
    after = measurer.time(regime, {**table, site: choice}, None)
    before = _both(first, measurer.time(regime, table, None))
    # No allowance for noise: 12 % of a site were seen to cost 0.4 % of the step.
    return after.median_us <= before.median_us


def _is_faster(one: Timing, other: Timing) -> bool:
    gain = other.median_us - one.median_us
    return gain > LEAST_GAIN * other.median_us and gain > max(one.spread_us, other.spread_us)


def _both(first: Timing, again: Timing) -> Timing:
    """One timing of two of the same thing: the better median, and a spread that holds both."""
    drift = abs(first.median_us - again.median_us)
    return Timing(
        min(first.median_us, again.median_us), max(first.spread_us, again.spread_us, drift)
    )


def _row(site: Site, built_in: str, before: Timing, choice: str, after: Timing) -> TunedSite:
    return TunedSite(
        op=site.op, tokens=site.tokens, sequences=site.sequences, n=site.n, k=site.k,
        dtype=site.dtype, layout=site.layout, rides=site.rides,
        built_in=built_in, built_in_us=round(before.median_us, 3),
        choice=choice, choice_us=round(after.median_us, 3),
    )  # fmt: skip
