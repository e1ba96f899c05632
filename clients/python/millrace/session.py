"""Sessions: many generations on one call, told apart by request ids."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from itertools import count
from typing import Self, Unpack

import grpc

from millrace.async_stream import AsyncStream
from millrace.errors import MillraceError, call_ended, from_rpc_error, session_left
from millrace.generation import GenerateOptions, Prompt, start_generation
from millrace.retries import Retries
from millrace.runtime.v1 import runtime_pb2
from millrace.tracing import current_traceparent

_Call = grpc.aio.StreamStreamCall[runtime_pb2.GenerateRequest, runtime_pb2.GenerateResponse]


# Tokens of a generation that the daemon may send before they are read: what its reader leaves unread is
# bounded, and holds up no other one of its call.
CREDIT_TOKENS = 1024


class Session:
    """Many generations on one call: the daemon sends one message a step for all of them.

    Leaving the block cancels what still runs. Where the call breaks, another one takes its place,
    and each stream goes on there, or fails, by itself.
    """

    def __init__(self, open_call: Callable[[], "_Call"], address: str, retries: Retries) -> None:
        self._open_call = open_call
        self._address = address
        self._retries = retries
        self._ids = count(1)
        self._current: _Connection | None = None

    async def __aenter__(self) -> Self:
        self._current = _Connection(self._open_call(), self._address)
        return self

    async def __aexit__(self, *_: object) -> None:
        current, self._current = self._connection(), None
        await current.close()

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> AsyncStream:
        """As `AsyncClient.generate`, on this session's call; the daemon alone keeps `timeout_s`."""
        self._connection()
        start = start_generation(prompt, **options)
        start.traceparent = current_traceparent()  # a call of its own has it in its metadata

        def open_call(command: runtime_pb2.GenerateStreamRequest, _: float | None) -> _SharedCall:
            if self._current is None:
                raise session_left(self._address)
            if self._current.failure is not None:
                self._current = _Connection(self._open_call(), self._address)
            return _SharedCall(self._connection(), _named(command, str(next(self._ids))))

        command = runtime_pb2.GenerateStreamRequest(start=start)
        return AsyncStream(open_call, command, self._address, self._retries)

    def _connection(self) -> "_Connection":
        assert self._current is not None, "a session is used inside its block"
        return self._current


def _named(
    command: runtime_pb2.GenerateStreamRequest, request_id: str
) -> runtime_pb2.GenerateRequest:
    """The command as one of many of a call, with its first credit."""
    request = runtime_pb2.GenerateRequest()
    if command.WhichOneof("command") == "resume":
        request.resume.CopyFrom(command.resume)
        request.resume.request_id = request_id
        request.resume.credit_tokens = CREDIT_TOKENS
    else:
        request.start.CopyFrom(command.start)
        request.start.request_id = request_id
        request.start.credit_tokens = CREDIT_TOKENS
    return request


class _Connection:
    """One call, and who reads what of it."""

    def __init__(self, call: "_Call", address: str) -> None:
        self.failure: MillraceError | None = None
        self._call = call
        self._address = address
        self._queues: dict[str, asyncio.Queue[runtime_pb2.Event | MillraceError]] = {}
        self._write_lock = asyncio.Lock()  # gRPC takes one message of a call at a time
        self._reader = asyncio.create_task(self._dispatch())

    async def close(self) -> None:
        """Ends the call, and with it what runs on it."""
        self._call.cancel()
        self._reader.cancel()
        await asyncio.wait({self._reader})
        self._fail(session_left(self._address))

    async def open(
        self, request_id: str, request: runtime_pb2.GenerateRequest
    ) -> asyncio.Queue[runtime_pb2.Event | MillraceError]:
        """Where the events of that generation will arrive; sends its request."""
        if self.failure is not None:
            raise self.failure
        queue: asyncio.Queue[runtime_pb2.Event | MillraceError] = asyncio.Queue()
        self._queues[request_id] = queue
        await self._send(request)
        return queue

    async def cancel(self, request_id: str) -> None:
        """Ends that generation; its events are no longer read."""
        queue = self._queues.pop(request_id, None)
        if queue is not None and self.failure is None:
            # Whoever reads it waits for nothing more.
            queue.put_nowait(call_ended(self._address))
            cancel = runtime_pb2.CancelGeneration(request_id=request_id)
            await self._send(runtime_pb2.GenerateRequest(cancel=cancel))

    async def credit(self, request_id: str, tokens: int) -> None:
        """Has the daemon send so many tokens more of that generation."""
        if self.failure is None:
            credit = runtime_pb2.AddCredit(request_id=request_id, tokens=tokens)
            await self._send(runtime_pb2.GenerateRequest(credit=credit))

    def forget(self, request_id: str) -> None:
        """Reads no more events of that generation."""
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
            self._fail(call_ended(self._address))
        except grpc.RpcError as raised:
            self._fail(from_rpc_error(raised, self._address))
        except asyncio.CancelledError:
            # As grpc.aio tells of a channel that was closed, and of `close`.
            self._fail(session_left(self._address))
            raise

    def _fail(self, failure: MillraceError) -> None:
        """Ends every stream with it, once."""
        if self.failure is None:
            self.failure = failure
            for queue in self._queues.values():
                queue.put_nowait(failure)


class _SharedCall:
    """One generation among others on a session's call."""

    def __init__(self, connection: _Connection, request: runtime_pb2.GenerateRequest) -> None:
        self._connection = connection
        self._request = request
        command = request.resume if request.HasField("resume") else request.start
        self._request_id = command.request_id

    async def events(self) -> AsyncIterator[Sequence[runtime_pb2.Event]]:
        """The events, as they arrive, to the terminal one."""
        queue = await self._connection.open(self._request_id, self._request)
        num_read = 0  # since the last credit
        try:
            while True:
                event = await queue.get()
                if isinstance(event, MillraceError):
                    raise event
                yield (event,)
                if event.WhichOneof("event") in ("finished", "error"):
                    return
                num_read += len(event.tokens.token_ids)
                if num_read >= CREDIT_TOKENS // 2:
                    await self._connection.credit(self._request_id, num_read)
                    num_read = 0
        finally:
            self._connection.forget(self._request_id)

    async def cancel(self) -> None:
        """Ends the generation."""
        await self._connection.cancel(self._request_id)
