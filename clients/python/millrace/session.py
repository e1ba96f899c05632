"""Sessions: many generations on one call, told apart by request ids."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from itertools import count
from typing import Self, Unpack

import grpc

from millrace.async_stream import AsyncStream
from millrace.errors import MillraceError, call_ended, from_rpc_error
from millrace.generation import GenerateOptions, Prompt, start_generation
from millrace.retries import Retries
from millrace.runtime.v1 import runtime_pb2

_Call = grpc.aio.StreamStreamCall[runtime_pb2.GenerateRequest, runtime_pb2.GenerateResponse]


class Session:
    """Many generations on one call: the daemon sends one message a step for all of them.

    Leaving the block cancels what still runs. A broken call fails every stream of the session.
    """

    def __init__(self, call: "_Call", address: str, retries: Retries) -> None:
        self._call = call
        self._address = address
        self._retries = retries
        self._ids = count(1)
        self._queues: dict[str, asyncio.Queue[runtime_pb2.Event | MillraceError]] = {}
        self._failure: MillraceError | None = None
        self._reader: asyncio.Task[None] | None = None
        self._write_lock = asyncio.Lock()  # gRPC takes one message of a call at a time

    async def __aenter__(self) -> Self:
        self._reader = asyncio.create_task(self._dispatch())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._reader is not None, "the session was not entered"
        self._call.cancel()
        self._reader.cancel()
        await asyncio.wait({self._reader})

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> AsyncStream:
        """As `AsyncClient.generate`, on this session's call."""
        assert self._reader is not None, "a session is used inside its block"

        def open_call() -> _SharedCall:
            return _SharedCall(self, start_generation(prompt, str(next(self._ids)), **options))

        return AsyncStream(open_call, self._address, self._retries)

    async def _open(
        self, start: runtime_pb2.StartGeneration
    ) -> asyncio.Queue[runtime_pb2.Event | MillraceError]:
        if self._failure is not None:
            raise self._failure
        queue: asyncio.Queue[runtime_pb2.Event | MillraceError] = asyncio.Queue()
        self._queues[start.request_id] = queue
        await self._send(runtime_pb2.GenerateRequest(start=start))
        return queue

    async def _cancel(self, request_id: str) -> None:
        if self._queues.pop(request_id, None) is not None and self._failure is None:
            cancel = runtime_pb2.CancelGeneration(request_id=request_id)
            await self._send(runtime_pb2.GenerateRequest(cancel=cancel))

    def _forget(self, request_id: str) -> None:
        self._queues.pop(request_id, None)

    async def _send(self, request: runtime_pb2.GenerateRequest) -> None:
        # Where the call has ended, the reader tells every stream why.
        with suppress(grpc.RpcError, asyncio.InvalidStateError):
            async with self._write_lock:
                await self._call.write(request)

    async def _dispatch(self) -> None:
        try:
            async for response in self._call:
                for event in response.events:
                    # Late events of a generation that its reader left have no queue.
                    if (queue := self._queues.get(event.request_id)) is not None:
                        queue.put_nowait(event)
            self._failure = call_ended(self._address)
        except grpc.RpcError as raised:
            self._failure = from_rpc_error(raised, self._address)
        for queue in self._queues.values():
            queue.put_nowait(self._failure)


class _SharedCall:
    """One generation among others on a session's call."""

    def __init__(self, session: "Session", start: runtime_pb2.StartGeneration) -> None:
        self._session = session
        self._start = start

    async def events(self) -> AsyncIterator[Sequence[runtime_pb2.Event]]:
        """The events, as they arrive, to the terminal one."""
        queue = await self._session._open(self._start)
        try:
            while True:
                event = await queue.get()
                if isinstance(event, MillraceError):
                    raise event
                yield (event,)
                if event.WhichOneof("event") in ("finished", "error"):
                    return
        finally:
            self._session._forget(self._start.request_id)

    async def cancel(self) -> None:
        """Ends the generation."""
        await self._session._cancel(self._start.request_id)
