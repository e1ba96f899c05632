"""What the compile daemon tells Prometheus, beside what every server tells about its calls."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_BUILD_BUCKETS_S = (1, 3, 10, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200)


class CompilerMetrics:
    """The compile daemon's counters; `registry` gets them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.asked = Counter(
            "millrace_builds_asked",
            "Engines asked for, by what was found: cached, or queued or joined.",
            ["found"],
            registry=registry,
        )
        self.ended = Counter(
            "millrace_builds_ended",
            "Attempts of this daemon, by how they ended: a build state, crashed, fenced, drained.",
            ["outcome", "arch"],
            registry=registry,
        )
        self.seconds = Histogram(
            "millrace_build_duration_seconds",
            "How long this daemon's successful builds took.",
            ["arch"],
            buckets=_BUILD_BUCKETS_S,
            registry=registry,
        )
        self.stage_seconds = Histogram(
            "millrace_build_stage_duration_seconds",
            "How long each stage of them took.",
            ["stage"],
            buckets=_BUILD_BUCKETS_S,
            registry=registry,
        )
        self.running = Gauge(
            "millrace_builds_running", "Builds that this daemon runs now.", registry=registry
        )
        self.waiting = Gauge(
            "millrace_build_queue_length",
            "Requests that wait for a worker, over all daemons; NaN while Redis is away.",
            registry=registry,
        )
