"""Generations that clients started on calls of their own, as the daemon sees them: on one call a caller.

A reader that is behind has its tokens joined here, as the daemon joins them for the readers that it
has itself: what a slow one costs stays what it asked for.
"""

import asyncio
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import grpc
from millrace.runtime.v1 import runtime_pb2 as pb
from millrace.runtime.v1 import runtime_pb2_grpc

from runtime_service.generation_call import GenerationCall, OnMember
from runtime_service.sample import join_chunks
from shared.auth import ANYBODY, TENANT_METADATA, Principal
from shared.background import Background
from shared.channels import error_of
from shared.errors import EngineLost, MillraceError, from_status, to_status
from shared.quotas import GenerationQuota

# Calls that are kept for callers who run nothing now; to open one anew takes a round trip.
_MAX_IDLE = 64


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, as the daemon is told: the metadata by which it knows callers."""

    metadata: tuple[tuple[str, str | bytes], ...]

    @staticmethod
    def of(metadata: tuple[tuple[str, str | bytes], ...]) -> "Caller":
        """The caller in a call's metadata."""
        return Caller(tuple(p for p in metadata if p[0] in ("authorization", TENANT_METADATA)))


class JoinedCalls:
    """One Generate call for each caller, opened when something is to run on it."""

    def __init__(self, upstream: grpc.aio.Channel) -> None:
        self._stub: runtime_pb2_grpc.RuntimeServiceAsyncStub
        self._stub = runtime_pb2_grpc.RuntimeServiceStub(upstream)
        self._calls: dict[Caller, JoinedCall] = {}

    def of(self, caller: Caller) -> "JoinedCall":
        """The call of `caller`; see `generate_calls.CallKeeper`."""
        call = self._calls.get(caller)
        if call is None:
            call = self._calls[caller] = JoinedCall(self, caller, self._stub)
        return call

    def idle(self, call: "JoinedCall") -> None:
        """Has `call`, on which nothing runs, end where there are many."""
        if len(self._calls) > _MAX_IDLE:
            call.half_close()
            self.ended(call)

    def ended(self, call: "JoinedCall") -> None:
        """Takes nothing more for `call`: the next of its caller's gets a new one."""
        if self._calls.get(call.caller) is call:
            del self._calls[call.caller]


class JoinedCall:
    """One Generate call to the daemon, and what runs on it, by the names that they have there."""

    def __init__(
        self,
        calls: JoinedCalls,
        caller: Caller,
        stub: "runtime_pb2_grpc.RuntimeServiceAsyncStub",
    ) -> None:
        self.caller = caller
        self._calls = calls
        self._call = stub.Generate(metadata=caller.metadata)
        self._running: dict[str, RelayedGeneration] = {}
        self._num_started = 0
        self._outbox: deque[pb.GenerateRequest] = deque()
        self._has_outbox = asyncio.Event()
        self._is_closing = False
        self._background = Background()
        self._background.run("read_daemon", self._read())
        self._background.run("write_daemon", self._write(), on_failure=self._call.cancel)

    # What calls of clients want of it: see `CallKeeper` and `Starter`.

    def open_call(self, caller: Principal = ANYBODY) -> "GenerationCall[RelayedGeneration]":
        """A client's call; give it back with `close_call`."""
        return GenerationCall(self, caller)

    def close_call(self, call: "GenerationCall[RelayedGeneration]") -> None:
        """Ends what still runs on `call`: nobody reads it."""
        call.close()

    def check_room(self, start: pb.StartGeneration, cache_salt: str) -> None:
        """Refuses nothing: the daemon does."""

    def new_generation(
        self, request_id: str, on_news: OnMember, on_end: OnMember, quota: GenerationQuota
    ) -> "RelayedGeneration":
        """A generation that is not started yet."""
        return RelayedGeneration(request_id, self, on_news, on_end)

    def start(
        self, generation: "RelayedGeneration", start: pb.StartGeneration, cache_salt: str
    ) -> None:
        """Has the daemon run it."""
        start.request_id = self._enter(generation)
        self.send(pb.GenerateRequest(start=start))

    def share_of_resumed(self, resume: pb.ResumeGeneration, cache_salt: str) -> None:
        """None: the daemon counts."""

    def resume(
        self, generation: "RelayedGeneration", resume: pb.ResumeGeneration, cache_salt: str
    ) -> None:
        """Likewise, where one of a lost call had come to."""
        resume.request_id = self._enter(generation)
        self.send(pb.GenerateRequest(resume=resume))

    def send(self, command: pb.GenerateRequest) -> None:
        """Passes on a command."""
        self._outbox.append(command)
        self._has_outbox.set()

    def forget(self, name: str) -> None:
        """Ends what runs under that name without another word of it; a no-op on what has ended."""
        if self._running.pop(name, None) is not None:
            self.send(pb.GenerateRequest(cancel=pb.CancelGeneration(request_id=name)))
            self._left()

    def half_close(self) -> None:
        """Ends with the last thing that runs on it."""
        self._is_closing = True
        self._has_outbox.set()

    def _enter(self, generation: "RelayedGeneration") -> str:
        self._num_started += 1
        name = generation.name = str(self._num_started)
        self._running[name] = generation
        return name

    def _left(self) -> None:
        if not self._running:
            self._calls.idle(self)

    async def _write(self) -> None:
        try:
            while not self._is_closing or self._outbox:
                while self._outbox:
                    await self._call.write(self._outbox.popleft())
                self._has_outbox.clear()
                if not self._is_closing:
                    await self._has_outbox.wait()
            await self._call.done_writing()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # the call has ended; whoever reads it says why

    async def _read(self) -> None:
        error: MillraceError = EngineLost(problem="the daemon ended the call")
        try:
            async for response in self._call:
                for event in response.events:
                    self._dispatch(event)
        except grpc.aio.AioRpcError as raised:
            error = error_of(raised)
        finally:
            self._calls.ended(self)
            self.half_close()
            running, self._running = self._running, {}
            for generation in running.values():
                generation.fail(error)

    def _dispatch(self, event: pb.Event) -> None:
        # Late events of what was forgotten are nobody's.
        generation = self._running.get(event.request_id)
        if generation is None:
            return
        if event.HasField("tokens"):
            generation.gained(event)
            return
        if not event.HasField("started"):
            del self._running[event.request_id]
            self._left()
        generation.told(event)


class RelayedGeneration:
    """One generation of a client's call; see `generation_call.CallMember`.

    Args:
        link: where its commands go.
    """

    def __init__(
        self, request_id: str, link: JoinedCall, on_news: OnMember, on_end: OnMember
    ) -> None:
        self.request_id = request_id
        self.name = ""
        self.error: MillraceError | None = None
        self.deadline: asyncio.TimerHandle | None = None
        self.num_unread_tokens = 0
        self._link = link
        self._on_news, self._on_end = on_news, on_end
        self._unread: list[pb.Event] = []
        self._is_ended = False

    # What its client says.

    def cancel(self) -> None:
        """Has the daemon end it and say so."""
        self._link.send(pb.GenerateRequest(cancel=pb.CancelGeneration(request_id=self.name)))

    def update(self, update: pb.UpdateGeneration) -> None:
        """Passes a checked update on."""
        update.request_id = self.name
        self._link.send(pb.GenerateRequest(update=update))

    def credit(self, credit: pb.AddCredit) -> None:
        """Passes checked credit on."""
        credit.request_id = self.name
        self._link.send(pb.GenerateRequest(credit=credit))

    def fail(self, error: MillraceError) -> None:
        """Ends it with `error`."""
        if not self._is_ended:
            self.error = error
            self._unread.append(pb.Event(request_id=self.request_id, error=to_status(error)))
            self._end()

    def abandon(self) -> None:
        """Ends it without an event: nobody is there to read it."""
        if not self._is_ended:
            self._end()

    def take_events(self) -> Iterator[pb.Event]:
        """Everything that happened since the last time, oldest first."""
        events, self._unread = self._unread, []
        self.num_unread_tokens = 0
        yield from events

    # What the daemon says.

    def gained(self, event: pb.Event) -> None:
        """Passes new tokens on; the event is the client's from here on."""
        chunk = event.tokens
        self.num_unread_tokens += len(chunk.token_ids) + len(chunk.prompt_logprobs)
        last = self._unread[-1] if self._unread else None
        if (
            last is None
            or not last.HasField("tokens")
            or last.tokens.sample_index != chunk.sample_index
            or not join_chunks(last.tokens, chunk)
        ):
            event.request_id = self.request_id
            self._unread.append(event)
        self._on_news(self)

    def told(self, event: pb.Event) -> None:
        """Passes on how it began or ended."""
        event.request_id = self.request_id
        self._unread.append(event)
        if event.HasField("started"):
            self._on_news(self)
            return
        if event.HasField("error"):
            self.error = from_status(event.error)
        self._end()

    def _end(self) -> None:
        self._is_ended = True
        if self.deadline is not None:
            self.deadline.cancel()
        self._link.forget(self.name)
        self._on_end(self)
