"""The runtime daemon's settings."""

import re
from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, model_validator

from shared.arch import ARCHES
from shared.engine import QuantConfig
from shared.settings import Address, Settings


class RuntimeSettings(Settings):
    """Serves one engine over gRPC (millrace.runtime.v1)."""

    component: ClassVar[str] = "runtime"

    listen: Address = Field("127.0.0.1:7602", description="host:port of the gRPC server")
    metrics_listen: Address = Field(
        "127.0.0.1:7612", description="host:port of the Prometheus metrics; empty: none"
    )
    advertise: Address = Field(
        "", description="host:port by which clients reach this daemon; empty: as bound"
    )
    compiler: Address = Field(
        "", description="host:port of a compile daemon to build and pull engines; empty: none"
    )
    cache: Path = Field(
        Path("~/.millrace/cache"), description="where engines are kept when the store is remote"
    )
    cache_bytes: int = Field(
        0, ge=0, description="bytes that --cache may hold, the least used engines go; 0: any number"
    )

    trusted_keys: Path | None = Field(
        None, description="public keys (PEM): engines that none of them signed are not loaded"
    )

    model: str = Field(
        "", description="model to serve, by name or digest; empty: wait for LoadEngine"
    )
    quant: str = Field("int8", description="quantization to serve, as int8 or int4-awq-g64")
    arch: str = Field("", description="arch to serve; empty: this machine's own")
    model_uri: str = Field(
        "", description="checkpoint to build from when the store lacks the engine; empty: do not"
    )

    deployment: str = Field(
        "", description="deployment to be a replica of; empty: while idle, of any that lacks one"
    )

    max_sequence_tokens: int = Field(
        0, ge=0, description="prompt and generated tokens of a sequence; 0: as the model allows"
    )
    max_sequences: int = Field(0, ge=0, description="sequences in one step; 0: chosen at start")
    max_step_tokens: int = Field(0, ge=0, description="tokens in one step; 0: chosen at start")
    kv_bytes: int = Field(0, ge=0, description="bytes of the KV cache; 0: from free memory")
    max_waiting_tokens: int = Field(
        0,
        ge=0,
        description="prompt tokens that wait when starts are refused; 0: four times the KV cache",
    )
    overlap: bool = Field(True, description="schedule a step while the one before runs")
    num_threads: int = Field(0, ge=0, description="CPU threads of the engine; 0: one a core")

    load_timeout_s: float = Field(900.0, gt=0, description="longest time to load an engine")
    step_timeout_s: float = Field(
        60.0, gt=0, description="a step that takes longer means that the engine hangs"
    )
    drain_s: float = Field(
        30.0, ge=0, description="after SIGTERM, how long running generations may go on"
    )
    exchange_s: float = Field(
        600.0,
        ge=0,
        description="when an engine is exchanged or unloaded, how long what runs on it may go on",
    )
    relays: int = Field(
        0, ge=0, le=64, description="processes that take clients' calls in front of it; 0: none"
    )
    heartbeat_s: float = Field(
        5.0, gt=0, description="between records in Redis; they expire after three"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.arch and self.arch not in ARCHES:
            raise ValueError(f"--arch {self.arch!r} is not one of {', '.join(ARCHES)}")
        if self.model_uri and not self.model:
            raise ValueError("--model-uri needs --model: the name that the engine gets")
        if self.model_uri and not self.compiler:
            raise ValueError("--model-uri needs --compiler: the daemon that builds the engine")
        if self.deployment and (self.model or not self.redis_url):
            raise ValueError("--deployment says what to serve: it needs --redis-url, no --model")
        quant_named(self.quant)
        return self


def quant_named(text: str) -> QuantConfig:
    """The quantization that `QuantConfig` writes as `text`.

    Raises:
        ValueError: it is not of that form.
    """
    # A scheme's own name may hold `-g`, as int4-gptq does.
    found = re.fullmatch(r"(.+?)(?:-g([1-9]\d*))?(?:-kv-(fp8|int8))?", text)
    if found is None or re.search(r"-g(?!ptq)|-kv", found[1]):
        raise ValueError(f"--quant {text!r} is not of the form int8, int4-awq-g64 or bf16-kv-fp8")
    return QuantConfig(found[1], int(found[2] or 0), kv_cache=found[3] or "")
