"""What a measurement says: percentiles, rates, goodput, failures; pure, and as JSON knows it."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from millrace.cli.bench.driver import Measurement
from millrace.cli.bench.timeline import Slo, Timeline, percentile

PERCENTILES = (50, 90, 99)
LATENCIES = {
    "ttft": "time to first token",
    "itl": "between tokens",
    "tpot": "a token, on average",
    "e2e": "whole answer",
}
# Beyond it, at the 99th percentile, the generator is part of what was measured.
LATE_S = 0.010


def summarize(measured: Measurement, slo: Slo) -> dict[str, Any]:
    """Latencies in milliseconds over finished requests, rates over the whole time."""
    timelines = measured.timelines
    finished = [t for t in timelines if t.is_finished]
    failed = Counter(t.failure for t in timelines if t.failure)
    duration_s = max(measured.end_s - measured.start_s, 1e-9)
    output_tokens = sum(t.num_tokens for t in finished)
    input_tokens = sum(t.planned.input_tokens for t in finished)
    summary: dict[str, Any] = {
        "duration_s": round(duration_s, 3),
        "requests": {
            "sent": len(timelines),
            "finished": len(finished),
            "failed": dict(failed.most_common()),
            "unfinished": sum(not t.is_over for t in timelines),
        },
        "failures": dict(measured.failures),
        "requests_per_s": round(len(finished) / duration_s, 3),
        "output_tokens_per_s": round(output_tokens / duration_s, 2),
        "total_tokens_per_s": round((output_tokens + input_tokens) / duration_s, 2),
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "mean_concurrency": round(sum(t.e2e_s for t in timelines) / duration_s, 2),
        "is_interrupted": measured.is_interrupted,
    }
    for name in LATENCIES:
        summary[f"{name}_ms"] = spread_ms(values_of(name, finished))
    summary["lag"] = _lag(measured)
    if slo.limits:
        good = [t for t in finished if slo.is_met(t)]
        summary["goodput"] = {
            "objectives_s": dict(slo.limits),
            "requests_per_s": round(len(good) / duration_s, 3),
            "output_tokens_per_s": round(sum(t.num_tokens for t in good) / duration_s, 2),
            # Failed ones count as not good; broken off ones as neither.
            "share": round(len(good) / max(len(finished) + failed.total(), 1), 4),
        }
    return summary


def values_of(latency: str, timelines: Iterable[Timeline]) -> list[float]:
    """Seconds of one of `LATENCIES`, in no order: a gap each for `itl`, else one a request."""
    if latency == "itl":
        return [gap for t in timelines for gap in t.itl_s()]
    values = (getattr(t, f"{latency}_s") for t in timelines)
    return [value for value in values if value is not None]


def spread_ms(seconds: list[float]) -> dict[str, float] | None:
    """Percentiles, mean and maximum in milliseconds; None where nothing was measured."""
    ordered = sorted(seconds)
    if not ordered:
        return None
    spread = {f"p{p}": percentile(ordered, p) or 0.0 for p in PERCENTILES}
    spread |= {"max": ordered[-1], "mean": sum(ordered) / len(ordered)}
    return {name: round(value * 1000, 3) for name, value in spread.items()}


def request_rows(measured: Measurement) -> list[dict[str, Any]]:
    """Each request, for programs that want more than percentiles."""
    return [
        {
            "number": t.planned.number,
            "start_s": round(t.start_s - measured.start_s, 6),
            "lag_s": round(t.lag_s, 6),
            "input_tokens": t.planned.input_tokens,
            "output_tokens": t.num_tokens,
            "ttft_s": None if t.ttft_s is None else round(t.ttft_s, 6),
            "e2e_s": round(t.e2e_s, 6) if t.is_finished else None,
            "failure": t.failure or None,
        }
        for t in measured.timelines
    ]


def _lag(measured: Measurement) -> dict[str, Any]:
    """How late requests were sent, and how late the generator's event loop ran."""
    sent = spread_ms([t.lag_s for t in measured.timelines])
    loop = spread_ms(measured.loop_lag_s)
    worst_ms = max(spread["p99"] for spread in (sent, loop, {"p99": 0.0}) if spread)
    return {"send_ms": sent, "loop_ms": loop, "fell_behind": worst_ms > LATE_S * 1000}
