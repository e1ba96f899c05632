"""One call: the generations that it started, and what of them its reader has not taken yet.

Many generations report in one step, and the reader takes all of it in one message. A reader that
is behind gets several steps joined, and no more commands are read from a client that leaves too
much unread: what a call can cost stays bounded. Knows the protocol's commands, not gRPC.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Protocol

from millrace.runtime.v1 import runtime_pb2 as pb

from runtime_service import validation
from runtime_service.generation import Generation
from runtime_service.metrics import RuntimeMetrics
from shared.edge import refuse_unknown_fields
from shared.errors import DeadlineExceeded, Draining, InvalidField, MillraceError, to_status

# Tokens in a message, and tokens of ended generations that may wait to be read; an end counts
# as some tokens too.
MAX_MESSAGE_TOKENS = 4096
MAX_UNREAD_TOKENS = 1 << 16
END_TOKENS = 32


class Starter(Protocol):
    """Where generations are started."""

    def start(self, generation: Generation, start: pb.StartGeneration, cache_salt: str) -> None:
        """Sees to it that `generation` runs, or ends it with an error; never raises."""


class GenerationCall:
    """The generations of one call.

    Args:
        cache_salt: separates the prefix cache of this client's tenant.
    """

    def __init__(self, starter: Starter, metrics: RuntimeMetrics, cache_salt: str) -> None:
        self._starter = starter
        self._metrics = metrics
        self._cache_salt = cache_salt
        self._running: dict[str, Generation] = {}
        # Generations with something to read, in the order in which they got it.
        self._unread: dict[Generation, None] = {}
        self._orphan_errors: list[pb.Event] = []
        self._num_ended_tokens = 0
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._takes_commands = True
        self._is_draining = False

    async def read(self, commands: AsyncIterator[pb.GenerateRequest]) -> None:
        """Follows commands until the client has no more, or leaves too much unread."""
        try:
            async for command in commands:
                self.follow(command)
                await self._room.wait()
        finally:
            self.half_close()

    def half_close(self) -> None:
        """No command comes any more: the call ends with its last generation."""
        self._takes_commands = False
        self._news.set()

    def drain(self) -> None:
        """Ends the call with DRAINING once nothing runs."""
        self._is_draining = True
        self._news.set()

    def fail_all(self, error: MillraceError) -> None:
        """Ends every generation with `error`."""
        for generation in list(self._running.values()):
            generation.fail(error)

    def close(self) -> None:
        """Ends every generation without a word: nobody reads any more."""
        for generation in list(self._running.values()):
            generation.abandon()

    async def messages(self) -> AsyncIterator[list[pb.Event]]:
        """What the generations gain, a message's worth at a time, until the last one has ended.

        Raises:
            Draining: the daemon stops, and all that ran has ended.
        """
        while True:
            self._news.clear()
            async for events in self._take():
                yield events
            if self._running or self._unread or self._orphan_errors:
                await self._news.wait()
            elif not self._takes_commands:
                return
            elif self._is_draining:
                raise Draining()
            else:
                await self._news.wait()

    def follow(self, command: pb.GenerateRequest) -> None:
        """Does what `command` says; what is wrong with it ends the generation that it names."""
        kind = command.WhichOneof("command")
        if kind is None:
            problem = "must be set: start, cancel, update or credit"
            self._report("", InvalidField(field="command", problem=problem))
            return
        request_id: str = getattr(command, kind).request_id
        try:
            refuse_unknown_fields(command)
            if kind == "start":
                self._check_new(request_id)
                self.start(command.start)
            elif request_id in self._running:
                self._change(self._running[request_id], command)
        except MillraceError as error:
            if kind == "start" or request_id not in self._running:
                self._report(request_id, error)
            else:
                self._running[request_id].fail(error)

    def start(self, start: pb.StartGeneration) -> Generation:
        """A generation that runs now, or has ended with an error.

        Raises:
            InvalidField: the timeout makes no sense.
        """
        timeout_s = validation.timeout_of(start)
        generation = Generation(
            start.request_id, self._metrics, on_news=self._on_news, on_end=self._on_end
        )
        self._running[start.request_id] = generation
        if timeout_s is not None:
            generation.deadline = asyncio.get_running_loop().call_later(
                timeout_s, generation.fail, DeadlineExceeded(timeout_s=timeout_s)
            )
        self._starter.start(generation, start, self._cache_salt)
        return generation

    def _check_new(self, request_id: str) -> None:
        validation.check_request_id(request_id)
        if request_id in self._running:
            problem = "a generation of this call has this id and still runs"
            raise InvalidField(field="start.request_id", problem=problem)

    @staticmethod
    def _change(generation: Generation, command: pb.GenerateRequest) -> None:
        if command.HasField("cancel"):
            generation.cancel()
        elif command.HasField("update"):
            validation.check_update(command.update)
            generation.update(command.update)
        else:
            validation.check_credit(command.credit)
            generation.credit(command.credit)

    def _report(self, request_id: str, error: MillraceError) -> None:
        """Tells of a command that no generation of its own stands for."""
        self._orphan_errors.append(pb.Event(request_id=request_id, error=to_status(error)))
        self._news.set()

    def _on_news(self, generation: Generation) -> None:
        self._unread[generation] = None
        self._news.set()

    def _on_end(self, generation: Generation) -> None:
        del self._running[generation.request_id]
        self._num_ended_tokens += generation.num_unread_tokens + END_TOKENS
        if self._num_ended_tokens > MAX_UNREAD_TOKENS:
            self._room.clear()
        self._on_news(generation)

    async def _take(self) -> AsyncIterator[list[pb.Event]]:
        unread, self._unread = self._unread, {}
        events, self._orphan_errors = self._orphan_errors, []
        num_tokens = 0
        self._num_ended_tokens = 0
        self._room.set()
        for generation in unread:
            for event in generation.take_events():
                events.append(event)
                tokens = event.tokens
                num_tokens += len(tokens.token_ids) + len(tokens.prompt_logprobs)
                if num_tokens >= MAX_MESSAGE_TOKENS:
                    yield events
                    events, num_tokens = [], 0
        if events:
            yield events
