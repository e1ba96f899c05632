"""One generation read with `for`, on a call of its own."""

import threading
from collections.abc import Callable, Iterator
from typing import Protocol, Self

import grpc

from millrace.attempts import StreamState
from millrace.errors import MillraceError, call_ended, from_rpc_error
from millrace.generation import Chunk, Generation
from millrace.retries import Retries
from millrace.runtime.v1 import runtime_pb2


class _Call(Protocol):
    def __iter__(self) -> Iterator[runtime_pb2.GenerateStreamResponse]: ...

    def cancel(self) -> object: ...


class Stream(StreamState):
    """One generation: iterate it for chunks; leave its block, or `close` it, to cancel the rest.

    A start that the daemon refuses with a retry delay is tried again as long as nothing arrived. A
    connection to a gateway that is lost later is made anew, and the generation goes on where it was.

    Args:
        open_call: given the request and the seconds that the call may take, if those are limited.
    """

    def __init__(
        self,
        open_call: Callable[[runtime_pb2.GenerateStreamRequest, float | None], _Call],
        command: runtime_pb2.GenerateStreamRequest,
        address: str,
        retries: Retries,
    ) -> None:
        super().__init__(command, retries)
        self._open_call = open_call
        self._address = address
        self._call: _Call | None = None
        self._closed = threading.Event()
        self._chunks = self._read()

    def __iter__(self) -> Iterator[Chunk]:
        return self._chunks

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancels what still runs; a no-op on a stream that has ended. Any thread may call it."""
        self._closed.set()
        if self._call is not None:
            self._call.cancel()

    def wait(self) -> Generation:
        """Reads what is left, and gives the finished generation."""
        for _ in self:
            pass
        return self.result

    def _read(self) -> Iterator[Chunk]:
        while not self._closed.is_set():
            try:
                request = self._attempts.open()
                self._call = self._open_call(request, self._attempts.timeout_s())
                if self._closed.is_set():
                    self._call.cancel()  # `close` came before it could see this call
                for response in self._call:
                    yield from self._collector.take_all(response.events)
                if self._collector.result is not None:
                    return
                error = call_ended(self._address)
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
            self._closed.wait(delay_s)
