"""One streamed answer as server-sent events, and what it takes to go on with it.

An event's id is the answer's and a number, `chatcmpl-...:17`; what each number stands for, a place
in every choice, is kept here, so that an id stays short whatever the number of choices. Going on
makes a new stream from the old one: numbers after that place are not used again, so that an id has
one meaning for ever. Knows no HTTP.
Source: WHATWG HTML Living Standard, 9.2, "Server-sent events".
"""

import asyncio
import re
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence

import msgspec
from millrace.runtime.v1 import runtime_pb2 as pb

from runtime_service.gateway.http.openai_answers import Answer, Chunk, Place
from runtime_service.gateway.routed_generation import RoutedGeneration
from shared.errors import GenerationNotFound, InvalidField

LAST_EVENT_ID = "Last-Event-ID"
EVENT_STREAM = "text/event-stream"

# In the place of a choice, what comes after all of them; and of a number of characters, an end.
_CLOSING = 0xFFFF
_END = 0xFFFF_FFFF
_EVENT_BYTES, _GENERATION_BYTES = 18, 128

_EVENT_ID = re.compile(r"([a-z]+-[0-9a-f]{32}):([0-9]{1,18})")

_encode = msgspec.json.Encoder().encode


def parse_event_id(event_id: str, id_prefix: str) -> tuple[str, int]:
    """The answer's id and the event's number.

    Raises:
        InvalidField: it is no id of an event here.
        GenerationNotFound: the answer is one of another endpoint.
    """
    found = _EVENT_ID.fullmatch(event_id)
    if found is None:
        problem = f"must be the id of an event of a stream, found {event_id[:100]!r}"
        raise InvalidField(field=LAST_EVENT_ID, problem=problem)
    if not found[1].startswith(id_prefix):
        raise GenerationNotFound(generation=found[1])
    return found[1], int(found[2])


class EventStream:
    """`answer`, as it is sent; `Keepable`.

    Args:
        cache_salt: the tenant that it is for.
        has_ids: its events have ids, and it can be gone on with.
    """

    def __init__(self, answer: Answer, cache_salt: str, *, has_ids: bool) -> None:
        self.answer, self.cache_salt, self.has_ids = answer, cache_salt, has_ids
        self.is_superseded, self.has_ended = False, asyncio.Event()
        # Of the connection that it is written to, while it is.
        self.transport: asyncio.Transport | None = None
        self._generation_ids: list[str] = []
        self._log = _Log()
        # Of the events that come after all choices.
        self._num_closed = 0

    @property
    def generation_id(self) -> str:
        """The answer's."""
        return self.answer.id

    @property
    def num_kept_bytes(self) -> int:
        """About what it takes."""
        return _EVENT_BYTES * len(self._log) + _GENERATION_BYTES * len(self._generation_ids)

    @property
    def is_told(self) -> bool:
        """Claims that its client has all of it."""
        return self._num_closed == len(self._closing())

    def supersede(self) -> None:
        """Breaks it off: its client goes on with it elsewhere."""
        self.is_superseded = True
        if self.transport is not None:
            self.transport.abort()

    def begun(self, generations: Sequence[RoutedGeneration]) -> None:
        """These run for it; of one that goes on, the ids are known."""
        self._generation_ids = self._generation_ids or [one.generation_id for one in generations]

    def encode(self, chunks: Iterable[Chunk]) -> bytes:
        """Events that say `chunks`."""
        return b"".join(
            [self._event(_encode(body), choice, place) for body, choice, place in chunks]
        )

    def encode_end(self) -> bytes:
        """The events that were not sent yet of those that come after all choices."""
        events = []
        for data in self._closing()[self._num_closed :]:
            self._num_closed += 1
            events.append(self._event(data, _CLOSING, Place(self._num_closed)))
        return b"".join(events)

    def after(self, number: int) -> "EventStream":
        """What comes after the event of that number.

        Raises:
            GenerationNotFound: there was none, or its client went on from before it.
        """
        log = self._log.until(number)
        if log is None:
            raise GenerationNotFound(generation=f"{self.answer.id}:{number}")
        places = log.places()
        closed = places.pop(_CLOSING, Place())
        stream = EventStream(self.answer.at(places), self.cache_salt, has_ids=True)
        stream._generation_ids = self._generation_ids
        stream._log, stream._num_closed = log, closed.num_tokens
        return stream

    def resumptions(self) -> list[pb.ResumeGeneration]:
        """What the gateway is to go on with: generations of which something was not told."""
        found = []
        for number, generation_id in enumerate(self._generation_ids):
            places = self.answer.places(number)
            if not all(place.has_ended for place in places):
                resume = pb.ResumeGeneration(request_id=str(number), generation_id=generation_id)
                resume.received_tokens.extend(place.num_tokens for place in places)
                found.append(resume)
        return found

    def _closing(self) -> list[bytes]:
        return [*map(_encode, self.answer.last_chunks()), b"[DONE]"]

    def _event(self, data: bytes, choice: int, place: Place) -> bytes:
        if not self.has_ids:
            return b"data: %b\n\n" % data
        number = self._log.add(choice, place)
        return b"id: %b:%d\ndata: %b\n\n" % (self.answer.id.encode(), number, data)


class _Log:
    """What each event's number stands for; a few bytes an event."""

    def __init__(self) -> None:
        self._numbers, self._choices = array("Q"), array("H")
        self._num_tokens, self._num_chars = array("I"), array("I")
        self._rests: dict[int, bytes] = {}  # by number, where there are any
        self._next_number = 0

    def __len__(self) -> int:
        return len(self._numbers)

    def add(self, choice: int, place: Place) -> int:
        """The number of an event that brings `choice` to `place`."""
        number = self._next_number
        self._next_number += 1
        self._numbers.append(number)
        self._choices.append(choice)
        self._num_tokens.append(place.num_tokens)
        self._num_chars.append(_END if place.has_ended else place.num_chars)
        if place.rest:
            self._rests[number] = place.rest
        return number

    def until(self, number: int) -> "_Log | None":
        """A log of the events up to that one, which goes on with new numbers; None: no such one."""
        at = bisect_left(self._numbers, number)
        if at == len(self._numbers) or self._numbers[at] != number:
            return None
        log, end = _Log(), at + 1
        log._numbers, log._choices = self._numbers[:end], self._choices[:end]
        log._num_tokens, log._num_chars = self._num_tokens[:end], self._num_chars[:end]
        log._rests = {n: rest for n, rest in self._rests.items() if n <= number}
        log._next_number = self._next_number
        return log

    def places(self) -> dict[int, Place]:
        """Where each choice stands at the end."""
        rows = zip(self._numbers, self._choices, self._num_tokens, self._num_chars, strict=True)
        return {
            choice: Place(num_tokens, has_ended=True)
            if num_chars == _END
            else Place(num_tokens, num_chars, self._rests.get(number, b""))
            for number, choice, num_tokens, num_chars in rows
        }
