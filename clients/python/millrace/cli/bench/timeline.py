"""One request as its client felt it, and what may be asked of it; pure."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from millrace.cli.bench.workload import Planned

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s)")


@dataclass(slots=True)
class Timeline:
    """What happened to a request; times are seconds of one clock.

    Args:
        due_s: when it was to be sent.
        start_s: when it was.
        arrivals: (time, tokens) of each message that brought some.
        end_s: of its last message, or of its failure.
        num_tokens: of its answer, as the server counts where it says so.
        failure: why it failed; "" where it did not.
        is_over: false for one that was broken off at the end of the measurement.
    """

    planned: Planned
    due_s: float
    start_s: float = 0.0
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    end_s: float = 0.0
    num_tokens: int = 0
    failure: str = ""
    is_over: bool = False

    @property
    def is_finished(self) -> bool:
        """Claims that the whole answer came."""
        return self.is_over and not self.failure

    @property
    def lag_s(self) -> float:
        """How late it was sent."""
        return self.start_s - self.due_s

    @property
    def ttft_s(self) -> float | None:
        """Time to first token, from sending; None before one came."""
        return self.arrivals[0][0] - self.start_s if self.arrivals else None

    @property
    def e2e_s(self) -> float:
        """From sending to the last message."""
        return self.end_s - self.start_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first, on average; None below two tokens."""
        if self.num_tokens < 2 or not self.arrivals:
            return None
        return (self.arrivals[-1][0] - self.arrivals[0][0]) / (self.num_tokens - 1)

    def itl_s(self) -> list[float]:
        """Seconds from each token to the next; tokens that came together share their wait."""
        gaps = []
        for (before_s, _), (now_s, tokens) in zip(self.arrivals, self.arrivals[1:], strict=False):
            gaps += [(now_s - before_s) / tokens] * tokens
        return gaps


@dataclass(frozen=True, slots=True)
class Slo:
    """What a good request keeps to, in seconds, by `ttft`, `itl`, `tpot` and `e2e`.

    `itl` is the 99th percentile of the request's own gaps, which below 100 tokens is the longest.
    """

    limits: Mapping[str, float]

    @staticmethod
    def parse(text: str) -> "Slo":
        """`ttft=0.5s,itl=50ms`.

        Raises:
            ValueError: a part of it makes no sense; the message says which.
        """
        limits = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, _, value = part.partition("=")
            match = _DURATION.fullmatch(value.strip())
            if name not in ("ttft", "itl", "tpot", "e2e") or match is None:
                raise ValueError(f"{part!r} is no objective: ttft, itl, tpot or e2e, as ttft=0.5s")
            limits[name] = float(match[1]) / (1000 if match[2] == "ms" else 1)
        return Slo(limits)

    def is_met(self, timeline: Timeline) -> bool:
        """Claims that the request finished, within all limits."""
        if not timeline.is_finished:
            return False
        felt = {
            "ttft": timeline.ttft_s,
            "tpot": timeline.tpot_s,
            "e2e": timeline.e2e_s,
            "itl": percentile(sorted(timeline.itl_s()), 99),
        }
        return all((felt[name] or 0.0) <= limit for name, limit in self.limits.items())


def percentile(ordered: Sequence[float], percent: float) -> float | None:
    """The nearest-rank percentile of sorted values; None where there are none."""
    if not ordered:
        return None
    return ordered[max(math.ceil(percent / 100 * len(ordered)) - 1, 0)]
