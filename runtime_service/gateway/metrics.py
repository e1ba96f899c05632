"""What the gateway tells Prometheus, beside what every server tells about its calls."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_WAIT_BUCKETS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)


class GatewayMetrics:
    """The gateway's counters; `registry` gets them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.ended = Counter(
            "millrace_gateway_generations",
            "Generations ended, by reason.",
            ["reason"],
            registry=registry,
        )
        self.moved = Counter(
            "millrace_gateway_moved_generations",
            "Generations that went on elsewhere, by what their runtime said or suffered.",
            ["reason"],
            registry=registry,
        )
        self.resumed = Counter(
            "millrace_gateway_resumed_generations",
            "Generations that a client took up again after it had lost its call.",
            registry=registry,
        )
        self.running = Gauge(
            "millrace_gateway_running_generations", "Generations now.", registry=registry
        )
        self.waiting = Gauge(
            "millrace_gateway_waiting_generations",
            "Those of them that wait for a runtime.",
            registry=registry,
        )
        self.runtimes = Gauge(
            "millrace_gateway_runtimes",
            "Runtimes that are known, and whether they can take generations.",
            ["usable"],
            registry=registry,
        )
        self.first_token_seconds = Histogram(
            "millrace_gateway_time_to_first_token_seconds",
            "From the start command to the first token.",
            buckets=_WAIT_BUCKETS_S,
            registry=registry,
        )
