"""What clients saw of a served workload, against when the engine drew each token."""

import statistics
from collections.abc import Mapping, Sequence

from bench.served_load import Arrivals, Work


def report(
    work: Work,
    seen: Mapping[int, Arrivals],
    emitted: Mapping[int, Sequence[float]],
    cpu_s: tuple[float, float],
) -> dict[str, object]:
    """Tokens/s, time to the first token, the front's part of a token's way, and how much was joined.

    Args:
        emitted: when each generation's tokens were drawn, on the same clock.
        cpu_s: of the front process, and of its relays, meanwhile.
    """
    total = sum(count for arrivals in seen.values() for _, count in arrivals.tokens)
    expected = work.count * work.output_tokens
    assert total == expected, f"{total} tokens came, not {expected}"
    began = min(arrivals.asked_s for arrivals in seen.values())
    ended = max(arrivals.tokens[-1][0] for arrivals in seen.values())
    num_events = sum(len(arrivals.tokens) for arrivals in seen.values())
    delays = sorted(
        delay for number, arrivals in seen.items() for delay in _delays(arrivals, emitted[number])
    )
    firsts = [arrivals.tokens[0][0] - arrivals.asked_s for arrivals in seen.values()]
    return {
        "out_tok_s": round(total / (ended - began), 1),
        "ttft_ms": {"median": _ms(statistics.median(firsts)), "max": _ms(max(firsts))},
        "extra_delay_ms": {
            "p50": _ms(_nth(delays, 0.5)), "p99": _ms(_nth(delays, 0.99)), "max": _ms(delays[-1])
        },
        "tokens_an_event": round(total / num_events, 3),
        "front_cpu_us_a_token": round(cpu_s[0] / total * 1e6, 2),
        "front_cores": round(cpu_s[0] / (ended - began), 2),
        "relays_cpu_us_a_token": round(cpu_s[1] / total * 1e6, 2),
    }  # fmt: skip


def _delays(arrivals: Arrivals, emitted: Sequence[float]) -> list[float]:
    """Of each token, from the engine to the client."""
    delays: list[float] = []
    for came, count in arrivals.tokens:
        delays += [came - drawn for drawn in emitted[len(delays) : len(delays) + count]]
    return delays


def _nth(ordered: Sequence[float], share: float) -> float:
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
