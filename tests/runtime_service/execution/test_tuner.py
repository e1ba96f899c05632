"""What is chosen from timings that are given: tuning without a device."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.gpu_models import MODELS, quantized_graph
from kernels.lowering import sites
from kernels.regimes import REGIMES, Regime
from kernels.tuning import LIBRARY, Site, TuningTable
from runtime_service.execution.tuner import LEAST_GAIN, Timing, tune
from shared.arch import ARCHES
from shared.tuning import TunedSite

_ARCH = ARCHES["sm_90"]
_GRAPH = quantized_graph(MODELS["llama-3.2-1b"], "bf16", 2)
_SITES = {site: names for regime in REGIMES for site, names in sites(_GRAPH, _ARCH, regime).items()}
_STEP_US = 1000.0

Times = Callable[[Site, str], float]


@dataclass
class Scripted:
    """A device on which each candidate takes as long as a script says, and a step the sum of what is in it.

    Args:
        alone: microseconds of a site's launches with a candidate.
        in_step: what a candidate adds to a step beside; nothing by default.
        spread: of every reading.
    """

    alone: Times
    in_step: Times = lambda site, name: 0.0
    spread: float = 0.0
    asked: list[tuple[Regime, Site | None]] = field(default_factory=list)

    def time(self, regime: Regime, table: TuningTable, site: Site | None) -> Timing:
        """As the script says."""
        self.asked.append((regime, site))
        names = sites(_GRAPH, _ARCH, regime)
        chosen = {s: table.get(s, candidates[0]) for s, candidates in names.items()}
        if site is not None:
            return Timing(self.alone(site, chosen[site]), self.spread)
        whole = _STEP_US + sum(self.in_step(s, name) for s, name in chosen.items())
        return Timing(whole, self.spread)


def _tuned(measurer: Scripted) -> dict[Site, TunedSite]:
    rows = tune(_GRAPH, _ARCH, measurer, lambda row: None)
    found = {
        Site(r.op, r.tokens, r.sequences, r.n, r.k, r.dtype, r.layout, r.rides): r for r in rows
    }
    assert len(found) == len(rows), "a site was measured twice"
    return found


def test_every_site_is_measured_once() -> None:
    assert _tuned(Scripted(lambda site, name: 10.0)).keys() == _SITES.keys()


@settings(max_examples=25, deadline=None)
@given(
    seed=st.randoms(use_true_random=False),
    spread=st.floats(0, 3),
)
def test_choices_are_candidates_that_won_beyond_noise(seed: object, spread: float) -> None:
    """Whatever the timings: no name that the engine has not, no loss, no gain that could be noise."""
    times: dict[tuple[Site, str], float] = {}

    def alone(site: Site, name: str) -> float:
        return times.setdefault((site, name), seed.uniform(5, 15))  # type: ignore[attr-defined]

    for site, row in _tuned(Scripted(alone, spread=spread)).items():
        assert row.choice in _SITES[site]
        assert row.built_in == _SITES[site][0]
        if row.choice == row.built_in:
            assert row.choice_us == row.built_in_us
            continue
        gain = times[site, row.built_in] - times[site, row.choice]
        assert gain > LEAST_GAIN * times[site, row.built_in]
        assert gain > spread
        assert row.choice_us == pytest.approx(min(times[site, n] for n in _SITES[site]), abs=1e-3)


@pytest.mark.parametrize(
    ("better", "spread", "is_taken"),
    [
        (10.0, 0.0, False),  # a tie
        (9.81, 0.0, False),  # within 2 %
        (9.7, 0.0, True),
        (9.7, 0.5, False),  # within what readings of one thing differ
        (9.0, 0.5, True),
    ],
)
def test_built_in_choice_stays_unless_another_is_better_for_sure(
    better: float, spread: float, is_taken: bool
) -> None:
    def alone(site: Site, name: str) -> float:
        return better if name == _SITES[site][-1] else 10.0

    for site, row in _tuned(Scripted(alone, spread=spread)).items():
        if LIBRARY not in _SITES[site]:
            assert (row.choice == _SITES[site][-1]) == is_taken


def test_what_wins_alone_and_slows_the_step_is_not_taken() -> None:
    """As a third stage of attention did: its shared memory kept the next linear's programs out."""

    def alone(site: Site, name: str) -> float:
        return 5.0 if name == _SITES[site][-1] else 10.0

    def in_step(site: Site, name: str) -> float:
        return 40.0 if site.op == "attention" and name != _SITES[site][0] else 0.0

    for site, row in _tuned(Scripted(alone, in_step)).items():
        if LIBRARY not in _SITES[site]:
            assert (row.choice == row.built_in) == (site.op == "attention")


@pytest.mark.parametrize(("step_us", "is_taken"), [(1.0, False), (0.0, True), (-1.0, True)])
def test_a_step_that_is_slower_by_less_than_noise_is_slower(step_us: float, is_taken: bool) -> None:
    def alone(site: Site, name: str) -> float:
        return 5.0 if name == _SITES[site][-1] else 10.0

    def in_step(site: Site, name: str) -> float:
        return step_us if name != _SITES[site][0] and LIBRARY not in _SITES[site] else 0.0

    for site, row in _tuned(Scripted(alone, in_step, spread=3.0)).items():
        if LIBRARY not in _SITES[site]:
            assert (row.choice != row.built_in) == is_taken


@pytest.mark.parametrize(("first", "is_taken"), [(11.0, False), (10.0, True)])
def test_drift_between_two_readings_of_the_built_in_choice_counts_as_noise(
    first: float, is_taken: bool
) -> None:
    """A clock that rises while candidates run makes them look better than what came before."""
    readings: dict[Site, int] = {}

    def alone(site: Site, name: str) -> float:
        if name != _SITES[site][0]:
            return 9.5
        readings[site] = readings.get(site, 0) + 1
        return first if readings[site] == 1 else 9.9

    for site, row in _tuned(Scripted(alone)).items():
        if LIBRARY not in _SITES[site]:
            assert (row.choice != row.built_in) == is_taken


@pytest.mark.parametrize(("library_us", "is_taken"), [(-100.0, True), (-5.0, False), (0.0, False)])
def test_library_takes_a_bucket_where_whole_steps_are_faster(
    library_us: float, is_taken: bool
) -> None:
    def in_step(site: Site, name: str) -> float:
        return library_us if name == LIBRARY else 0.0

    measurer = Scripted(lambda site, name: 10.0, in_step)
    rows = {s: r for s, r in _tuned(measurer).items() if LIBRARY in _SITES[s]}
    assert {site.tokens for site in rows} == {16, 32, 64}
    assert {row.choice == LIBRARY for row in rows.values()} == {is_taken}


def test_a_site_is_measured_in_the_largest_step_that_has_it() -> None:
    measurer = Scripted(lambda site, name: 10.0)
    _tuned(measurer)
    where: Mapping[Site, set[Regime]] = {site: set() for site in _SITES}
    for regime, site in measurer.asked:
        if site is not None:
            where[site].add(regime)
    for site, regimes in where.items():
        if LIBRARY in _SITES[site]:
            continue
        (regime,) = regimes
        if site.op == "linear" and site.tokens == 16:
            assert regime == Regime(16, 16)
        if site.op == "attention" and site.sequences:
            assert regime.max_sequences == site.sequences


def test_rows_are_told_as_they_are_known() -> None:
    told: list[TunedSite] = []
    rows = tune(_GRAPH, _ARCH, Scripted(lambda site, name: 10.0), told.append)
    assert tuple(told) == rows


def test_spread_of_a_timing_ignores_outliers() -> None:
    timing = Timing.of([10.0, 10.1, 9.9, 10.0, 500.0])
    assert timing.median_us == 10.0
    assert timing.spread_us == pytest.approx(0.1)
