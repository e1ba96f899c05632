"""What the runtime tells Prometheus: load, KV use, latencies, tokens.

Counting happens once per generation and step on the event loop alone, so numbers are plain Python
and cost nanoseconds; Prometheus's own types appear when it asks.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator

from prometheus_client import Metric
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.registry import Collector

from runtime_service.engine_messages import EngineStats

_STEP_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
_WAIT_BUCKETS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
_WHOLE_BUCKETS_S = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800)


class Distribution:
    """A histogram that one thread fills."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Counts `value`."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def family(self, name: str, documentation: str) -> HistogramMetricFamily:
        """As Prometheus reads it: cumulative."""
        buckets, total = [], 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        return HistogramMetricFamily(name, documentation, buckets=buckets, sum_value=self._sum)


class RuntimeMetrics(Collector):
    """Everything the runtime counts; register it with the daemon's registry."""

    def __init__(self) -> None:
        self.queue_seconds = Distribution(_WAIT_BUCKETS_S)
        self.first_token_seconds = Distribution(_WAIT_BUCKETS_S)
        self.inter_token_seconds = Distribution(_STEP_BUCKETS_S)
        self.generation_seconds = Distribution(_WHOLE_BUCKETS_S)
        # Smoothed over about the last ten generations; 0 before the first.
        self.recent_first_token_s = 0.0
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.engine_restarts = 0
        self._generations: Counter[str] = Counter()
        self._stats: EngineStats | None = None
        # Sums over the engine processes that have ended; each counts from 0.
        self._steps = self._preemptions = self._hit_tokens = self._query_tokens = 0

    def first_token(self, seconds: float) -> None:
        """Counts how long a generation waited for its first token."""
        self.first_token_seconds.observe(seconds)
        recent_s = self.recent_first_token_s or seconds
        self.recent_first_token_s = recent_s + 0.1 * (seconds - recent_s)

    def ended(self, reason: str, total_s: float) -> None:
        """Counts a generation that has ended."""
        self._generations[reason] += 1
        self.generation_seconds.observe(total_s)

    def num_ended(self, reason: str) -> int:
        """Generations that have ended so."""
        return self._generations[reason]

    def stepped(self, stats: EngineStats) -> None:
        """Takes the engine's state after a step."""
        self._stats = stats

    def engine_ended(self) -> None:
        """The engine process is gone; what it counted stays."""
        if self._stats is not None:
            self._steps += self._stats.steps
            self._preemptions += self._stats.preemptions
            self._hit_tokens += self._stats.prefix_hit_tokens
            self._query_tokens += self._stats.prefix_query_tokens
        self._stats = None

    def collect(self) -> Iterator[Metric]:
        """All families, as they stand."""
        stats = self._stats
        yield from self._gauges(stats)
        totals = (
            ("prompt_tokens", "Prompt tokens of accepted generations.", self.prompt_tokens),
            ("generated_tokens", "Tokens generated.", self.generated_tokens),
            ("engine_restarts", "Engine processes lost and restarted.", self.engine_restarts),
            ("steps", "Engine steps.", self._steps + (stats.steps if stats else 0)),
            (
                "preemptions",
                "Sequences put back to make room in the KV cache.",
                self._preemptions + (stats.preemptions if stats else 0),
            ),
            (
                "prefix_cache_hit_tokens",
                "Prompt tokens found in the KV cache.",
                self._hit_tokens + (stats.prefix_hit_tokens if stats else 0),
            ),
            (
                "prefix_cache_query_tokens",
                "Prompt tokens looked up in the KV cache.",
                self._query_tokens + (stats.prefix_query_tokens if stats else 0),
            ),
        )
        for name, documentation, value in totals:
            yield CounterMetricFamily(f"millrace_{name}", documentation, value=value)
        ended = CounterMetricFamily(
            "millrace_generations", "Generations ended, by reason.", labels=["reason"]
        )
        for reason, count in sorted(self._generations.items()):
            ended.add_metric([reason], count)
        yield ended
        for name, documentation, distribution in (
            ("queue_seconds", "From the start command to the first step.", self.queue_seconds),
            ("time_to_first_token_seconds", "To the first token.", self.first_token_seconds),
            ("inter_token_seconds", "Between tokens of a sample.", self.inter_token_seconds),
            ("generation_seconds", "Whole generations.", self.generation_seconds),
        ):
            yield distribution.family(f"millrace_{name}", documentation)

    @staticmethod
    def _gauges(stats: EngineStats | None) -> Iterator[Metric]:
        num_blocks = stats.num_blocks if stats else 0
        num_used = num_blocks - stats.num_free_blocks if stats else 0
        for name, documentation, value in (
            ("waiting_sequences", "Sequences waiting.", stats.num_waiting if stats else 0),
            ("waiting_tokens", "Tokens to be computed.", stats.waiting_tokens if stats else 0),
            ("running_sequences", "Sequences with KV blocks.", stats.num_running if stats else 0),
            ("step_tokens", "Tokens in the last step.", stats.step_tokens if stats else 0),
            ("kv_blocks", "Blocks of the KV cache.", num_blocks),
            ("kv_used_ratio", "Share of KV blocks in use.", num_used / max(num_blocks, 1)),
        ):
            yield GaugeMetricFamily(f"millrace_{name}", documentation, value=value)
