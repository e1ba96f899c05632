"""One generation read with `for`, on a call of its own."""

import time
from collections.abc import Callable, Iterator
from typing import Protocol, Self

import grpc

from millrace.errors import MillraceError, from_rpc_error
from millrace.generation import Chunk, Collector, Generation
from millrace.retries import Retries
from millrace.runtime.v1 import runtime_pb2


class _Call(Protocol):
    def __iter__(self) -> Iterator[runtime_pb2.GenerateStreamResponse]: ...

    def cancel(self) -> object: ...


class Stream:
    """One generation: iterate it for chunks; leave its block, or `close` it, to cancel the rest.

    A start that the daemon refuses with a retry delay is tried again as long as nothing arrived.
    """

    def __init__(
        self,
        open_call: Callable[[], _Call],
        address: str,
        retries: Retries,
    ) -> None:
        self._open_call = open_call
        self._address = address
        self._retries = retries
        self._call: _Call | None = None
        self._is_closed = False
        self._collector = Collector()
        self._chunks = self._read()

    def __iter__(self) -> Iterator[Chunk]:
        return self._chunks

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancels what still runs; a no-op on a stream that has ended. Any thread may call it."""
        self._is_closed = True
        if self._call is not None:
            self._call.cancel()

    @property
    def result(self) -> Generation:
        """The finished generation.

        Raises:
            RuntimeError: the stream was not read to its end.
        """
        if self._collector.result is None:
            raise RuntimeError("the generation has not finished: read the stream to its end first")
        return self._collector.result

    def wait(self) -> Generation:
        """Reads what is left, and gives the finished generation."""
        for _ in self:
            pass
        return self.result

    def _read(self) -> Iterator[Chunk]:
        attempt = 0
        while not self._is_closed:
            try:
                self._call = self._open_call()
                for response in self._call:
                    yield from self._collector.take_all(response.events)
                return
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
            time.sleep(delay_s)
