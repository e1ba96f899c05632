"""The gateway's settings."""

from typing import ClassVar, Self

from pydantic import Field, model_validator

from shared.settings import Address, Settings


class GatewaySettings(Settings):
    """Serves a fleet of runtimes as one (millrace.runtime.v1, millrace.fleet.v1)."""

    component: ClassVar[str] = "gateway"

    listen: Address = Field("127.0.0.1:7600", description="host:port of the gRPC server")
    http_listen: Address = Field(
        "127.0.0.1:7620",
        description="host:port of the OpenAI-compatible HTTP server and the web page; empty: none",
    )
    metrics_listen: Address = Field(
        "127.0.0.1:7610", description="host:port of the Prometheus metrics; empty: none"
    )
    runtimes: tuple[Address, ...] = Field(
        (), description="host:port of runtimes, beside those that Redis knows"
    )
    compiler: Address = Field(
        "", description="host:port of a compile daemon whose builds the web page shows"
    )
    poll_s: float = Field(1.0, gt=0, description="between looks at Redis and at each runtime")
    silent_s: float = Field(
        10.0, gt=0, description="a runtime that is silent this long is lost, and its streams move"
    )
    wait_s: float = Field(
        30.0, ge=0, description="how long a generation waits for a runtime that can run it"
    )
    keep_s: float = Field(
        60.0, ge=0, description="how long a generation can be resumed after its call was lost"
    )
    relays: int = Field(
        0,
        ge=0,
        le=64,
        description="processes that take clients' gRPC calls in front of it; 0: none",
    )
    drain_s: float = Field(
        30.0, ge=0, description="after SIGTERM, how long running generations may go on"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.redis_url and not self.runtimes:
            raise ValueError("set --redis-url or --runtimes: where the runtimes are")
        return self
