"""One call: the generations that it started, and what of them its reader has not taken yet.

Many generations report in one step, and the reader takes all of it in one message. A reader that
is behind gets several steps joined, and no more commands are read from a client that leaves too
much unread: what a call can cost stays bounded. Knows the protocol's commands, not gRPC.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Generic, Protocol, TypeVar

from millrace.runtime.v1 import runtime_pb2 as pb

from runtime_service import validation
from shared.auth import ANYBODY, Principal
from shared.edge import refuse_unknown_fields
from shared.errors import DeadlineExceeded, Draining, InvalidField, MillraceError, to_status
from shared.quotas import GenerationQuota

# Tokens in a message, and tokens of what has ended that may wait to be read. Events without tokens
# count as some in their message, an end as more while it waits, and the bytes of a name and of a
# refusal as well: they may be long.
MAX_MESSAGE_TOKENS = 4096
MAX_UNREAD_TOKENS = 1 << 16
END_TOKENS = 32
_EVENT_TOKENS = 4
_TOKEN_BYTES = 16
# Refusals wait so long for each other: a message for each is what a flood of them costs most.
GATHERING_S = 0.01


class CallMember(Protocol):
    """A generation, as its call knows it: it takes commands, and events are taken from it.

    `deadline` ends it, and is cancelled with it. `num_unread_tokens` wait to be taken.
    """

    request_id: str
    error: MillraceError | None
    deadline: asyncio.TimerHandle | None
    num_unread_tokens: int

    def cancel(self) -> None:
        """Ends it with FINISH_REASON_CANCELLED."""

    def update(self, update: pb.UpdateGeneration) -> None:
        """Follows a checked update."""

    def credit(self, credit: pb.AddCredit) -> None:
        """Takes checked credit."""

    def fail(self, error: MillraceError) -> None:
        """Ends it with `error`; means nothing once it has ended."""

    def abandon(self) -> None:
        """Ends it without an event: nobody is there to read it. What has ended drops what it has."""

    def take_events(self) -> Iterator[pb.Event]:
        """Everything that happened since the last time, oldest first; may be taken slowly."""


Member = TypeVar("Member", bound=CallMember)
OnMember = Callable[[CallMember], None]


class Starter(Protocol[Member]):
    """Where generations are started."""

    def check_room(self, start: pb.StartGeneration, cache_salt: str) -> None:
        """Refuses `start` before it has cost anything, where it is known to be refused.

        Raises:
            QueueFull: there is no room for it.
        """

    def new_generation(
        self, request_id: str, on_news: OnMember, on_end: OnMember, quota: GenerationQuota
    ) -> Member:
        """A generation that is not started yet.

        Args:
            quota: what it holds of its tenant's; it gives that back at its end.
            on_news: called when there are events to take.
            on_end: called once, when the terminal event is there to take.
        """

    def start(self, generation: Member, start: pb.StartGeneration, cache_salt: str) -> None:
        """Sees to it that `generation` runs, or ends it with an error; never raises."""

    def share_of_resumed(
        self, resume: pb.ResumeGeneration, cache_salt: str
    ) -> GenerationQuota | None:
        """What the generation that `resume` names holds of its tenant's quota; None where that is not known here."""

    def resume(self, generation: Member, resume: pb.ResumeGeneration, cache_salt: str) -> None:
        """Likewise, where a generation of a lost call had come to."""


class GenerationCall(Generic[Member]):
    """The generations of one call.

    Args:
        caller: whose tenant has its own prefix cache and quota.
    """

    def __init__(self, starter: Starter[Member], caller: Principal = ANYBODY) -> None:
        self._starter = starter
        self._quota = caller.quota
        self._cache_salt = caller.tenant
        self._running: dict[str, Member] = {}
        # What there is to read, in the order in which it came, and what of it counts as owed.
        self._unread: dict[CallMember | _Refusal, int] = {}
        self._num_owed_tokens = 0
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._gathering: asyncio.TimerHandle | None = None
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
        if self._gathering is not None:
            self._gathering.cancel()
        unread, self._unread = self._unread, {}
        for one in unread:
            one.abandon()

    async def messages(self) -> AsyncIterator[list[pb.Event]]:
        """What the generations gain, a message's worth at a time, until the last one has ended.

        Raises:
            Draining: the daemon stops, and all that ran has ended.
        """
        while True:
            self._news.clear()
            for events in self._take():
                yield events
            if self._running or self._unread:
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
            problem = "must be set: start, cancel, update, credit or resume"
            self.refuse("", InvalidField(field="command", problem=problem))
            return
        request_id: str = getattr(command, kind).request_id
        try:
            refuse_unknown_fields(command)
            if kind in ("start", "resume"):
                self._check_new(request_id, kind)
            if kind == "start":
                self.start(command.start)
            elif kind == "resume":
                self.resume(command.resume)
            elif request_id in self._running:
                self._change(self._running[request_id], command)
        except MillraceError as error:
            if kind in ("start", "resume") or request_id not in self._running:
                self.refuse(request_id, error)
            else:
                self._running[request_id].fail(error)

    def start(self, start: pb.StartGeneration) -> Member:
        """A generation that runs now, or has ended with an error.

        Raises:
            InvalidField: the timeout makes no sense, or the tenant's generations may not have this priority.
            QuotaExceeded: the tenant has too many requests in this second, or running.
            QueueFull: too many wait already.
        """
        timeout_s = validation.timeout_of(start)
        self._quota.count_request()
        self._quota.check_priority(start.priority, "start.priority")
        # Whom its own limit keeps out does not stand in the line that all share.
        self._quota.check_concurrent()
        self._starter.check_room(start, self._cache_salt)
        generation = self._open(start.request_id)
        if timeout_s is not None:
            generation.deadline = asyncio.get_running_loop().call_later(
                timeout_s, generation.fail, DeadlineExceeded(timeout_s=timeout_s)
            )
        self._starter.start(generation, start, self._cache_salt)
        return generation

    def resume(self, resume: pb.ResumeGeneration) -> Member:
        """A generation that goes on now, or has ended with an error.

        Raises:
            QuotaExceeded: as `start`.
        """
        self._quota.count_request()
        # The call of the one before may be lost without anybody having noticed yet.
        before = self._starter.share_of_resumed(resume, self._cache_salt)
        generation = self._open(resume.request_id, before)
        self._starter.resume(generation, resume, self._cache_salt)
        return generation

    def refuse(self, request_id: str, error: MillraceError) -> None:
        """Tells of a command that no generation of its own stands for."""
        self._owe(_Refusal(request_id, error), len(str(error)) // _TOKEN_BYTES)
        if self._gathering is None:
            loop = asyncio.get_running_loop()
            self._gathering = loop.call_later(GATHERING_S, self._gathered)

    def _open(self, request_id: str, before: GenerationQuota | None = None) -> Member:
        quota = self._quota.open_generation(in_place_of=before)
        generation = self._starter.new_generation(request_id, self._on_news, self._on_end, quota)
        self._running[request_id] = generation
        return generation

    def _check_new(self, request_id: str, kind: str) -> None:
        field = f"{kind}.request_id"
        validation.check_request_id(request_id, field)
        if request_id in self._running:
            problem = "a generation of this call has this id and still runs"
            raise InvalidField(field=field, problem=problem)

    def _change(self, generation: CallMember, command: pb.GenerateRequest) -> None:
        if command.HasField("cancel"):
            generation.cancel()
        elif command.HasField("update"):
            validation.check_update(command.update)
            self._quota.check_priority(command.update.priority, "update.priority")
            generation.update(command.update)
        else:
            validation.check_credit(command.credit)
            generation.credit(command.credit)

    def _on_news(self, generation: CallMember) -> None:
        self._unread.setdefault(generation, 0)
        self._news.set()

    def _on_end(self, generation: CallMember) -> None:
        del self._running[generation.request_id]
        self._owe(generation, generation.num_unread_tokens)
        self._news.set()

    def _owe(self, ended: "CallMember | _Refusal", num_tokens: int) -> None:
        """Counts what waits to be read of something that nothing but its reader bounds any more."""
        num_tokens += END_TOKENS + len(ended.request_id) // _TOKEN_BYTES
        self._unread[ended] = num_tokens
        self._num_owed_tokens += num_tokens
        if self._num_owed_tokens > MAX_UNREAD_TOKENS:
            self._room.clear()

    def _gathered(self) -> None:
        self._gathering = None
        self._news.set()

    def _take(self) -> Iterator[list[pb.Event]]:
        unread, self._unread = self._unread, {}
        events: list[pb.Event] = []
        num_tokens = 0
        for one, num_owed_tokens in unread.items():
            for event in one.take_events():
                events.append(event)
                num_tokens += _num_tokens(event)
                if num_tokens >= MAX_MESSAGE_TOKENS:
                    yield events
                    events, num_tokens = [], 0
            self._num_owed_tokens -= num_owed_tokens
            if self._num_owed_tokens <= MAX_UNREAD_TOKENS:
                self._room.set()
        if events:
            yield events


class _Refusal:
    """A command that is refused without a generation: it has ended before it began."""

    def __init__(self, request_id: str, error: MillraceError) -> None:
        self.request_id = request_id
        self._error = error

    def abandon(self) -> None:
        """Nobody reads it."""

    def take_events(self) -> Iterator[pb.Event]:
        """Its one event."""
        yield pb.Event(request_id=self.request_id, error=to_status(self._error))


def _num_tokens(event: pb.Event) -> int:
    """What `event` counts in its message."""
    if event.HasField("tokens"):
        return len(event.tokens.token_ids) + len(event.tokens.prompt_logprobs)
    return _EVENT_TOKENS + len(event.request_id) // _TOKEN_BYTES
