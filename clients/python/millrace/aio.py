"""The asyncio client: as `Client`, with `await`."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from itertools import count
from typing import Self, TypeVar, Unpack

import grpc

from millrace.async_stream import AsyncStream, SingleCall
from millrace.attempts import resume_generation
from millrace.builds import RecipeOptions, build_request, has_ended, raise_if_failed
from millrace.channels import DEFAULT_COMPILER, DEFAULT_RUNTIME, Security, open_async_channel
from millrace.compiler.v1 import compiler_pb2, compiler_pb2_grpc
from millrace.engine.v1 import engine_pb2
from millrace.errors import MillraceError, call_ended, from_rpc_error
from millrace.generation import GenerateOptions, Prompt, start_generation
from millrace.retries import LASTING_WATCH_S, Retries
from millrace.runtime.v1 import runtime_pb2, runtime_pb2_grpc
from millrace.session import Session

_Answer = TypeVar("_Answer")
_GenerateCall = grpc.aio.StreamStreamCall[runtime_pb2.GenerateRequest, runtime_pb2.GenerateResponse]


class AsyncClient:
    """Both daemons, from one place; make it inside a running event loop. As `Client`."""

    def __init__(
        self,
        compiler: str = DEFAULT_COMPILER,
        runtime: str = DEFAULT_RUNTIME,
        *,
        timeout_s: float = 30.0,
        retries: Retries | None = None,
        api_key: str = "",
        tls_ca: str = "",
        tls_cert: str = "",
        tls_key: str = "",
    ) -> None:
        security = Security(api_key, tls_ca, tls_cert, tls_key)
        self._compiler_address, self._runtime_address = compiler, runtime
        self._timeout_s = timeout_s
        self._retries = retries or Retries()
        self._compiler_channel = open_async_channel(compiler, security)
        self._runtime_channel = open_async_channel(runtime, security)
        self._compiler = compiler_pb2_grpc.CompilerServiceStub(self._compiler_channel)
        self._runtime = runtime_pb2_grpc.RuntimeServiceStub(self._runtime_channel)

    async def close(self) -> None:
        """Closes the connections; what streams still run end as cancelled."""
        await self._compiler_channel.close()
        await self._runtime_channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def build(
        self,
        model_uri: str,
        archs: Sequence[str] = ("cpu",),
        quant: str = "",
        *,
        group_size: int = 0,
        model: str = "",
        on_change: Callable[[compiler_pb2.Operation], None] | None = None,
        **recipe: Unpack[RecipeOptions],
    ) -> compiler_pb2.Operation:
        """As `Client.build`."""
        request = build_request(model_uri, archs, quant, group_size, model, **recipe)

        async def ask() -> compiler_pb2.Operation:
            return (await self._ask_compiler(self._compiler.BuildEngine, request)).operation

        name = (await ask()).name
        async for operation in self.watch_operation(name, ask):
            if on_change is not None:
                on_change(operation)
        raise_if_failed(operation)
        return operation

    async def watch_operation(
        self, name: str, ask_again: Callable[[], Awaitable[compiler_pb2.Operation]] | None = None
    ) -> AsyncIterator[compiler_pb2.Operation]:
        """As `Client.watch_operation`."""
        request = compiler_pb2.WatchOperationRequest(name=name)
        attempt, known = 0, None
        while True:
            began_s = time.monotonic()
            try:
                async for response in self._compiler.WatchOperation(request):
                    if response.operation != known:  # a watch begins with what it told last
                        attempt, known = 0, response.operation
                    yield response.operation
                    if has_ended(response.operation):
                        return
                error = call_ended(self._compiler_address)
            except grpc.RpcError as raised:
                error = from_rpc_error(raised, self._compiler_address)
            # A watch that lasted was answered: what lies between may end calls on which nothing is said.
            attempt = 1 if time.monotonic() - began_s > LASTING_WATCH_S else attempt + 1
            if ask_again is None or not self._retries.asks_again(error, attempt):
                await self._wait_or_raise(error, attempt)
            else:
                request.name = (await ask_again()).name

    async def get_engine(self, name: str) -> compiler_pb2.GetEngineResponse:
        """As `Client.get_engine`."""
        request = compiler_pb2.GetEngineRequest(name=name)
        return await self._ask_compiler(self._compiler.GetEngine, request)

    async def get_status(self) -> runtime_pb2.GetStatusResponse:
        """As `Client.get_status`."""
        request = runtime_pb2.GetStatusRequest()
        return await self._ask(
            self._runtime.GetStatus, request, self._runtime_address, self._timeout_s
        )

    async def load_engine(
        self,
        model: str,
        quant: str,
        *,
        group_size: int = 0,
        kv_cache: str = "",
        arch: str = "",
        model_uri: str = "",
    ) -> engine_pb2.Engine:
        """As `Client.load_engine`."""
        quant_config = engine_pb2.QuantConfig(
            scheme=quant, group_size=group_size, kv_cache=kv_cache
        )
        selector = engine_pb2.EngineSelector(model=model, arch=arch, quant=quant_config)
        request = runtime_pb2.LoadEngineRequest(selector=selector, model_uri=model_uri)
        method = self._runtime.LoadEngine
        return (await self._ask(method, request, self._runtime_address, None)).engine

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> "AsyncStream":
        """As `Client.generate`, with `async with` and `async for`."""
        start = start_generation(prompt, **options)
        return self._stream(runtime_pb2.GenerateStreamRequest(start=start))

    def resume(self, generation_id: str, received_tokens: Sequence[int] = ()) -> "AsyncStream":
        """As `Client.resume`."""
        return self._stream(resume_generation(generation_id, received_tokens))

    def _stream(self, command: runtime_pb2.GenerateStreamRequest) -> AsyncStream:
        return AsyncStream(
            lambda request, timeout_s: SingleCall(
                self._runtime.GenerateStream(request, timeout=timeout_s)
            ),
            command,
            self._runtime_address,
            self._retries,
        )

    def session(self) -> "Session":
        """Many generations on one call, for callers with many streams.

        async with client.session() as session:
            await asyncio.gather(*(session.generate(prompt).wait() for prompt in prompts))
        """
        return Session(self._runtime.Generate, self._runtime_address, self._retries)

    async def _ask_compiler(
        self, method: Callable[..., Awaitable[_Answer]], request: object
    ) -> _Answer:
        return await self._ask(method, request, self._compiler_address, self._timeout_s)

    async def _ask(
        self,
        method: Callable[..., Awaitable[_Answer]],
        request: object,
        address: str,
        timeout_s: float | None,
    ) -> _Answer:
        for attempt in count(1):
            try:
                return await method(request, timeout=timeout_s)
            except grpc.RpcError as raised:
                await self._wait_or_raise(from_rpc_error(raised, address), attempt)
        raise AssertionError("unreachable: the loop returns or raises")

    async def _wait_or_raise(self, error: MillraceError, attempt: int) -> None:
        delay_s = self._retries.delay_s(error, attempt)
        if delay_s is None:
            raise error from None
        await asyncio.sleep(delay_s)
