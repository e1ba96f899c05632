"""One generation read with `async for`, over a call of its own or a shared one."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol, Self

import grpc

from millrace.errors import MillraceError, from_rpc_error
from millrace.generation import Chunk, Collector, Generation
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


class AsyncStream:
    """One generation: as `Stream`, with `async for` and `async with`."""

    def __init__(
        self,
        open_call: Callable[[], GenerationCall],
        address: str,
        retries: Retries,
    ) -> None:
        self._open_call = open_call
        self._address = address
        self._retries = retries
        self._call: GenerationCall | None = None
        self._is_closed = False
        self._collector = Collector()
        self._chunks = self._read()

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self._chunks

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancels what still runs; a no-op on a stream that has ended."""
        self._is_closed = True
        if self._call is not None and self._collector.result is None:
            await self._call.cancel()

    @property
    def result(self) -> Generation:
        """The finished generation; RuntimeError while the stream was not read to its end."""
        if self._collector.result is None:
            raise RuntimeError("the generation has not finished: read the stream to its end first")
        return self._collector.result

    async def wait(self) -> Generation:
        """Reads what is left, and gives the finished generation."""
        async for _ in self:
            pass
        return self.result

    async def _read(self) -> AsyncIterator[Chunk]:
        attempt = 0
        while not self._is_closed:
            try:
                self._call = self._open_call()
                async for events in self._call.events():
                    for chunk in self._collector.take_all(events):
                        yield chunk
                return
            except asyncio.CancelledError:
                # grpc.aio says a call that `close` cancelled in the same words as a cancelled task.
                if self._is_closed:
                    return
                await self._call.cancel()  # type: ignore[union-attr]
                raise
            except grpc.RpcError as raised:
                error = from_rpc_error(raised, self._address)
            except MillraceError as failed:
                error = failed
            if self._is_closed:
                return
            attempt += 1
            delay_s = None
            if not self._collector.has_started:
                delay_s = self._retries.delay_s(error, attempt)
            if delay_s is None:
                raise error
            await asyncio.sleep(delay_s)
