"""Real compile daemons as processes, and a client of them."""

import json
import os
import signal
import subprocess
import sys
import threading
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


class CompilerDaemon:
    """`python -m compiler_service` with a store and a cache under `root`; see `started`."""

    def __init__(self, redis_url: str, root: Path, *flags: str) -> None:
        environ = {k: v for k, v in os.environ.items() if not k.startswith("MILLRACE_")}
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "compiler_service",
                "--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0",
                "--redis-url", redis_url, "--store", str(root / "store"),
                "--cache-dir", str(root / "cache"), "--state-dir", str(root / "redis"),
                "--lease-s", "1.5", "--log-format", "json", *flags,
            ],
            stderr=subprocess.PIPE,
            text=True,
            env={**environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self.lines: list[dict[str, Any]] = []
        self._has_line = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.address = str(self.wait_for("server_started")["address"])

    def wait_for(self, event: str, timeout_s: float = 60.0) -> dict[str, Any]:
        """The first log line of that event."""
        found: list[dict[str, Any]] = []

        def is_there() -> bool:
            found[:] = [line for line in self.lines if line.get("event") == event]
            return bool(found) or self.process.poll() is not None

        with self._has_line:
            self._has_line.wait_for(is_there, timeout_s)
        assert found, f"no {event} in {self.lines[-20:]}"
        return found[0]

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for text in self.process.stderr:
            try:
                line = json.loads(text)
            except ValueError:
                line = {"event": "", "text": text}
            with self._has_line:
                self.lines.append(line)
                self._has_line.notify_all()
        with self._has_line:
            self._has_line.notify_all()


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
        return (await self.stub.BuildEngine(request, timeout=30)).operation

    async def end_of(self, operation: Any) -> Any:
        """The operation when all of it has ended."""
        request = compiler_pb2.WatchOperationRequest(name=operation.name)
        async for response in self.stub.WatchOperation(request, timeout=90):
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
