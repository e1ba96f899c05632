"""The compile daemon's settings."""

from pathlib import Path
from typing import ClassVar, cast

from pydantic import Field, model_validator

from shared.settings import Address, Settings
from shared.store import EngineStore, open_store
from shared.store.remote import GrpcStore


class CompilerSettings(Settings):
    """The compile daemon: builds engines and serves the store."""

    component: ClassVar[str] = "compiler"

    listen: Address = Field(
        "127.0.0.1:7601", description="host:port of gRPC; port 0 takes a free one"
    )
    metrics_listen: Address = Field(
        "127.0.0.1:7611", description="host:port of Prometheus metrics over HTTP; empty: none"
    )
    state_dir: Path = Field(
        Path("~/.millrace/redis"),
        description="data of the embedded Valkey, which runs where no --redis-url is given",
    )
    cache_dir: Path = Field(
        Path("~/.millrace/cache"),
        description="hashes of files, what hubs and samples fetch, engines of a store elsewhere",
    )
    cache_bytes: int = Field(
        0, ge=0, description="bytes of engines to keep here of a store elsewhere; 0: any number"
    )
    worker: bool = Field(True, description="build here; otherwise only take requests")
    lease_s: float = Field(
        30.0, ge=0.5, le=3600, description="seconds after which a silent worker counts as lost"
    )
    max_queued: int = Field(
        1000, ge=1, description="requests that may wait for a worker; more are refused"
    )
    drain_s: float = Field(
        30.0, ge=0, le=3600, description="seconds that running calls have when the daemon stops"
    )

    @model_validator(mode="after")
    def _check(self) -> "CompilerSettings":
        if self.store.startswith("grpc://"):
            raise ValueError(
                "--store (MILLRACE_STORE): the compile daemon writes engines, so it needs a folder, "
                "s3:// or oci://"
            )
        if self.metrics_listen == self.listen and not self.listen.endswith(":0"):
            raise ValueError(f"--listen and --metrics-listen are both {self.listen}")
        return self

    def open_store(self) -> EngineStore:
        """The store; a folder is made if it is missing."""
        store = open_store(self.store)
        assert not isinstance(store, GrpcStore), "a compile daemon's store cannot be written to"
        return cast(EngineStore, store)
