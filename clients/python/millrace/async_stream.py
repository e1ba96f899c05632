"""One generation read with `async for`, over a call of its own or a shared one."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Protocol, Self

import grpc

from millrace.attempts import StreamState
from millrace.errors import MillraceError, call_ended, from_rpc_error
from millrace.generation import Chunk, Generation
from millrace.retries import Retries
from millrace.runtime.v1 import runtime_pb2


class GenerationCall(Protocol):
    """Where the events of one started generation come from."""

    def events(self) -> AsyncIterator[Sequence[runtime_pb2.Event]]:
        """The events, as they arrive, to the terminal one."""
        ...

    async def cancel(self) -> None:
        """Ends the generation."""
        ...


class SingleCall:
    """One generation on a call of its own."""

    def __init__(
        self,
        call: "grpc.aio.UnaryStreamCall[runtime_pb2.GenerateStreamRequest, "
        "runtime_pb2.GenerateStreamResponse]",
    ) -> None:
        self._call = call

    async def events(self) -> AsyncIterator[Sequence[runtime_pb2.Event]]:
        """The events, as they arrive."""
        async for response in self._call:
            yield response.events

    async def cancel(self) -> None:
        """Ends the generation."""
        self._call.cancel()


class AsyncStream(StreamState):
    """One generation: as `Stream`, with `async for` and `async with`."""

    def __init__(
        self,
        open_call: Callable[[runtime_pb2.GenerateStreamRequest, float | None], GenerationCall],
        command: runtime_pb2.GenerateStreamRequest,
        address: str,
        retries: Retries,
    ) -> None:
        super().__init__(command, retries)
        self._open_call = open_call
        self._address = address
        self._call: GenerationCall | None = None
        self._closed = asyncio.Event()
        self._chunks = self._read()

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self._chunks

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancels what still runs; a no-op on a stream that has ended."""
        self._closed.set()
        if self._call is not None and self._collector.result is None:
            await self._call.cancel()

    async def wait(self) -> Generation:
        """Reads what is left, and gives the finished generation."""
        async for _ in self:
            pass
        return self.result

    async def _read(self) -> AsyncIterator[Chunk]:
        while not self._closed.is_set():
            try:
                request = self._attempts.open()
                self._call = self._open_call(request, self._attempts.timeout_s())
                async for events in self._call.events():
                    for chunk in self._collector.take_all(events):
                        yield chunk
                if self._collector.result is not None:
                    return
                error = call_ended(self._address)
            except asyncio.CancelledError:
                # grpc.aio says a call that `close` cancelled in the same words as a cancelled task.
                if self._closed.is_set():
                    return
                await self._call.cancel()  # type: ignore[union-attr]
                raise
            except grpc.RpcError as raised:
                if self._collector.result is not None:
                    return  # it had ended before its call broke
                error = from_rpc_error(raised, self._address)
            except MillraceError as failed:
                error = failed
            if self._closed.is_set():
                return
            delay_s = self._attempts.delay_s(error)
            if delay_s is None:
                raise error
            with suppress(TimeoutError):
                await asyncio.wait_for(self._closed.wait(), delay_s)
