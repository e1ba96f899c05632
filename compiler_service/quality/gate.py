"""The quality gate: what a measurement may be, and a set of weights to keep that is, as small as is found."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from compiler_service.quality.report import Measurement
from shared.engine import QuantConfig
from shared.errors import QualityGate

_NUM_NAMED = 4
# Of the weights that were found to do, so many are tried without.
_NUM_TRIED_WITHOUT = 8


def exceeded(measurement: Measurement, quant: QuantConfig) -> str:
    """What is beyond the limits of `quant`, for people; empty where nothing is."""
    found = []
    if not measurement.kl_mean <= quant.max_kl:
        found.append(f"KL divergence {measurement.kl_mean:.4g} beyond {quant.max_kl:g}")
    if not measurement.perplexity_increase <= quant.max_perplexity_increase:
        found.append(
            f"perplexity {measurement.perplexity_increase:+.2%} "
            f"beyond {quant.max_perplexity_increase:+.2%}"
        )
    return " and ".join(found)


@dataclass(frozen=True, slots=True)
class Kept:
    """Weights that stay in bf16, and what was measured with them."""

    weights: frozenset[str]
    measurement: Measurement


def fewest_kept(
    ranked: Sequence[str],
    measure: Callable[[frozenset[str]], Measurement],
    passes: Callable[[Measurement], bool],
) -> Kept | None:
    """Few weights that pass when they are kept; every claim is measured.

    A beginning of `ranked` is doubled until it passes, then halved towards the last one that did not:
    few sets are measured where few weights do. What ranks last of it is then left out, one by one,
    where that passes too: of up to 9 weights none can go. None where keeping all of `ranked` does not
    pass.
    """
    measure = functools.cache(measure)
    size, failed = 1, 0
    best = None
    while best is None and failed < len(ranked):
        size = min(size, len(ranked))
        best = _passing(frozenset(ranked[:size]), measure, passes)
        if best is None:
            failed, size = size, 2 * size
    while best is not None and len(best.weights) - failed > 1:
        size = (failed + len(best.weights)) // 2
        smaller = _passing(frozenset(ranked[:size]), measure, passes)
        if smaller is None:
            failed = size
        else:
            best = smaller
    if best is None:
        return None
    # Without its last one, and with none at all, it was measured and failed.
    return _less_needless(best, ranked[: failed + 1][-_NUM_TRIED_WITHOUT - 1 :], measure, passes)


def _less_needless(
    best: Kept,
    tried: Sequence[str],
    measure: Callable[[frozenset[str]], Measurement],
    passes: Callable[[Measurement], bool],
) -> Kept:
    """`best` less those of `tried` that can go, from the last but one on; each that stays has failed
    to go from the very set that is given.

    What was needed beside others may not be without them, as errors can cancel each other: once one
    is gone, those that had to stay are tried again.
    """
    *untried, last = tried
    needed = [last]
    while untried and len(best.weights) > 1:
        name = untried.pop()
        smaller = _passing(best.weights - {name}, measure, passes)
        if smaller is None:
            needed.append(name)
        else:
            best = smaller
            untried, needed = [*needed, *untried], []
    return best


def _passing(
    weights: frozenset[str],
    measure: Callable[[frozenset[str]], Measurement],
    passes: Callable[[Measurement], bool],
) -> Kept | None:
    """These weights kept, if that passes."""
    measurement = measure(weights)
    return Kept(weights, measurement) if passes(measurement) else None


def gate_error(
    quant: QuantConfig, problem: str, measurement: Measurement, found: Kept | None
) -> QualityGate:
    """The error of a build whose `measurement` is beyond its limits, and how it would pass."""
    worst = ", ".join(measurement.worst[:_NUM_NAMED]) or "none, as no weight is quantized"
    if found is None:
        other = "leave out --kv-cache" if quant.kv_cache else "take another scheme"
        advice = f"no choice of layers to keep passes; raise the limits or {other}"
    else:
        # Not at the sentence's end, whose dot would be copied along.
        advice = f"--keep {','.join([*quant.keep, *sorted(found.weights)])} passes"
    return QualityGate(problem=f"{problem}; {advice}; worst layers: {worst}")
