"""Real compile daemons as processes, and a client of them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_status import rpc_status
from millrace.compiler.v1 import compiler_pb2, compiler_pb2_grpc
from millrace.engine.v1 import engine_pb2

from shared.errors import reason_of
from tests.integration.daemon_process import DaemonProcess


class CompilerDaemon(DaemonProcess):
    """`python -m compiler_service`, its store and cache under `root`; listens when it is made.

    Args:
        file_limit_bytes: largest file that it and its children may write; 0 sets no limit.
        lease_s: short where a test waits for the builds of another daemon that is lost; else a lease runs out only
            on a machine that stands still.
    """

    def __init__(
        self,
        redis_url: str,
        root: Path,
        *flags: str,
        file_limit_bytes: int = 0,
        lease_s: float = 60.0,
    ) -> None:
        super().__init__(
            "compiler_service",
            "--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0",
            "--redis-url", redis_url, "--store", str(root / "store"),
            "--cache-dir", str(root / "cache"), "--state-dir", str(root / "redis"),
            "--lease-s", str(lease_s), *flags,
            wrapper=("prlimit", f"--fsize={file_limit_bytes}") if file_limit_bytes else (),
        )  # fmt: skip
        self.metrics_address = str(self.wait_for("compiler_started")["metrics"])


class Client:
    """A client of one compile daemon."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.stub: Any = compiler_pb2_grpc.CompilerServiceStub(channel)

    async def ask(self, model: Path | str, *archs: str, scheme: str = "fp32") -> Any:
        """The operation of a BuildEngine call."""
        request = compiler_pb2.BuildEngineRequest(
            model_uri=str(model), archs=archs, quant=engine_pb2.QuantConfig(scheme=scheme)
        )
        return (await self.stub.BuildEngine(request, timeout=60)).operation

    async def end_of(self, operation: Any) -> Any:
        """The operation when all of it has ended."""
        request = compiler_pb2.WatchOperationRequest(name=operation.name)
        async for response in self.stub.WatchOperation(request, timeout=240):
            operation = response.operation
        return operation

    async def built(self, model: Path | str, *archs: str, scheme: str = "fp32") -> Any:
        """The ended operation of a BuildEngine call."""
        return await self.end_of(await self.ask(model, *archs, scheme=scheme))


@asynccontextmanager
async def client_of(daemon: CompilerDaemon) -> AsyncIterator[Client]:
    async with grpc.aio.insecure_channel(daemon.address) as channel:
        yield Client(channel)


async def refusal(call: Any) -> tuple[grpc.StatusCode, str, str]:
    """Code, reason and sentence of a call that fails."""
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call
    status = rpc_status.from_call(failed.value)
    assert status is not None, f"no details: {failed.value}"
    return failed.value.code(), reason_of(status), str(failed.value.details())
