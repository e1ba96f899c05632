"""Events of generations as OpenAI's clients read them: one body, or chunks of a stream.

How a choice looks is its endpoint's `Shape` (openai_shapes.py).
"""

import codecs
import time
import uuid
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from millrace.runtime.v1 import runtime_pb2 as pb

from runtime_service.gateway.http.openai_shapes import Json, Shape

_utf8_decoder = codecs.getincrementaldecoder("utf-8")
_REASONS = {
    pb.FINISH_REASON_STOP_TOKEN: "stop",
    pb.FINISH_REASON_STOP_STRING: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_CANCELLED: "stop",
}


class Usage(Enum):
    """Where a stream says what was used: nowhere, in a chunk of its own at the end, in every one too."""

    NONE = "none"
    AT_END = "at end"
    ALWAYS = "always"


class Place(NamedTuple):
    """How far a streamed choice has come.

    Args:
        num_tokens: whose text is out, or held back by what comes next.
        num_chars: of tokens whose log probabilities are out.
        rest: bytes of a character that those tokens have begun.
    """

    num_tokens: int = 0
    num_chars: int = 0
    rest: bytes = b""
    has_ended: bool = False


class Chunk(NamedTuple):
    """A message of a stream, and how far it brings the choice that it is of."""

    body: Json
    choice: int
    place: Place


@dataclass(slots=True)
class _Choice:
    texts: list[str] = field(default_factory=list)
    rows: list[pb.TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    num_tokens: int = 0
    num_chars: int = 0
    has_begun: bool = False
    has_ended: bool = False
    decoder: codecs.IncrementalDecoder = field(default_factory=lambda: _utf8_decoder("replace"))

    @staticmethod
    def at(place: Place) -> "_Choice":
        """A choice that is streamed and has come so far."""
        choice = _Choice(
            num_tokens=place.num_tokens,
            num_chars=place.num_chars,
            has_begun=True,
            has_ended=place.has_ended,
        )
        choice.decoder.setstate((place.rest, 0))
        return choice

    @property
    def place(self) -> Place:
        """How far it has come."""
        return Place(self.num_tokens, self.num_chars, self.decoder.getstate()[0], self.has_ended)

    def offsets(self, rows: Iterable[pb.TokenLogprob]) -> list[int]:
        """Where the tokens of `rows`, which come after those before, begin in the text."""
        offsets = []
        for row in rows:
            offsets.append(self.num_chars)
            self.num_chars += len(self.decoder.decode(row.token))
        return offsets


class Answer:
    """One request's answer, from its generations' events.

    Args:
        model: as it was asked for; "" tells what answers.
        num_generations: that it is made of.
        num_samples: of each generation; choices are numbered through all of them.
        usage: where a stream says what was used.
    """

    def __init__(
        self, shape: Shape, model: str, num_generations: int, num_samples: int, usage: Usage
    ) -> None:
        self._shape, self._usage = shape, usage
        self.num_generations, self.num_samples = num_generations, num_samples
        self._choices: dict[int, _Choice] = defaultdict(_Choice)
        # Of the generations that have ended, by their place.
        self._usages: dict[int, pb.Usage] = {}
        self._num_prompt_tokens: dict[int, int] = {}
        self._head: Json = {
            "id": shape.id_prefix + uuid.uuid4().hex,
            "object": shape.object,
            "created": int(time.time()),
            "model": model,
        }

    @property
    def id(self) -> str:
        """Its name."""
        return str(self._head["id"])

    def at(self, places: Mapping[int, Place]) -> "Answer":
        """This one as a stream, with choices that have come so far; the others have not begun."""
        other = Answer(self._shape, "", self.num_generations, self.num_samples, self._usage)
        other._head = dict(self._head)
        other._usages = dict(self._usages)
        other._num_prompt_tokens = dict(self._num_prompt_tokens)
        other._choices.update((index, _Choice.at(place)) for index, place in places.items())
        return other

    def places(self, generation: int) -> list[Place]:
        """How far the samples of a generation have come."""
        first = generation * self.num_samples
        return [self._choices[first + sample].place for sample in range(self.num_samples)]

    @property
    def is_complete(self) -> bool:
        """Claims that every choice of the stream has ended."""
        indices = range(self.num_generations * self.num_samples)
        return all(self._choices[index].has_ended for index in indices)

    def take(self, events: Iterable[pb.Event]) -> None:
        """Keeps what `events` say, for `body`."""
        for event in events:
            kind = event.WhichOneof("event")
            if kind == "started":
                self._on_started(event)
            elif kind == "tokens":
                choice = self._choices[self._index(event, event.tokens.sample_index)]
                choice.texts.append(event.tokens.text)
                choice.rows.extend(event.tokens.logprobs)
            else:
                self._on_finished(event)
                for finish in event.finished.samples:
                    choice = self._choices[self._index(event, finish.sample_index)]
                    choice.finish_reason = _REASONS[finish.reason]

    def body(self) -> Json:
        """All of it."""
        choices = []
        for index, choice in sorted(self._choices.items()):
            whole = self._shape.whole("".join(choice.texts))
            logprobs = self._logprobs(choice, choice.rows)
            choices.append(_choice(index, whole, logprobs, choice.finish_reason))
        return {**self._head, "choices": choices, "usage": self._used()}

    def chunks(self, events: Iterable[pb.Event]) -> list[Chunk]:
        """What `events` add to a stream."""
        chunks: list[Chunk] = []
        for event in events:
            kind = event.WhichOneof("event")
            if kind == "started":
                self._on_started(event)
                if (first := self._shape.first()) is not None:
                    indices = [self._index(event, s) for s in range(self.num_samples)]
                    # One that goes on has said it.
                    chunks += [self._chunk(i, first) for i in indices if not self._begin(i)]
            elif kind == "tokens":
                index = self._index(event, event.tokens.sample_index)
                text, rows = event.tokens.text, event.tokens.logprobs
                self._choices[index].num_tokens += len(event.tokens.token_ids)
                if text or rows:
                    chunks.append(self._chunk(index, self._shape.delta(text), rows))
            else:
                self._on_finished(event)
                for finish in event.finished.samples:
                    index = self._index(event, finish.sample_index)
                    choice, end = self._choices[index], self._shape.delta("")
                    if not choice.has_ended:
                        choice.has_ended = True
                        chunks.append(self._chunk(index, end, reason=_REASONS[finish.reason]))
        return chunks

    def _begin(self, index: int) -> bool:
        """Whether the choice had begun; it has now."""
        choice = self._choices[index]
        had_begun, choice.has_begun = choice.has_begun, True
        return had_begun

    def last_chunks(self) -> list[Json]:
        """What a stream ends with."""
        if self._usage is Usage.NONE:
            return []
        return [self._stream_head() | {"choices": [], "usage": self._used()}]

    def _chunk(
        self,
        index: int,
        content: Json,
        rows: Sequence[pb.TokenLogprob] = (),
        reason: str | None = None,
    ) -> Chunk:
        choice = self._choices[index]
        logprobs = self._logprobs(choice, rows)
        body = self._stream_head() | {"choices": [_choice(index, content, logprobs, reason)]}
        if self._usage is Usage.AT_END:
            body["usage"] = None
        elif self._usage is Usage.ALWAYS:
            # The choice's own, as vLLM has it; the last chunk has all of them.
            prompt = self._num_prompt_tokens[index // self.num_samples]
            body["usage"] = _tokens_used(prompt, choice.num_tokens)
        return Chunk(body, index, choice.place)

    def _logprobs(self, choice: _Choice, rows: Sequence[pb.TokenLogprob]) -> Json | None:
        return self._shape.logprobs(rows, choice.offsets(rows)) if rows else None

    def _stream_head(self) -> Json:
        return self._head | {"object": self._shape.chunk_object}

    def _index(self, event: pb.Event, sample_index: int) -> int:
        return int(event.request_id) * self.num_samples + sample_index

    def _on_started(self, event: pb.Event) -> None:
        started = event.started
        self._num_prompt_tokens[int(event.request_id)] = started.prompt_tokens
        # The same engine and seed give the same tokens: what OpenAI calls a fingerprint.
        self._head["system_fingerprint"] = "fp_" + started.engine.rpartition("/")[2][:12]

    def _on_finished(self, event: pb.Event) -> None:
        self._usages[int(event.request_id)] = event.finished.usage

    def _used(self) -> Json:
        usages = self._usages.values()
        num_prompt_tokens = sum(usage.prompt_tokens for usage in usages)
        num_tokens = sum(usage.generated_tokens for usage in usages)
        num_cached_tokens = sum(usage.cached_prompt_tokens for usage in usages)
        details = {"prompt_tokens_details": {"cached_tokens": num_cached_tokens}}
        return _tokens_used(num_prompt_tokens, num_tokens) | details


def _tokens_used(num_prompt_tokens: int, num_tokens: int) -> Json:
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_tokens,
        "total_tokens": num_prompt_tokens + num_tokens,
    }


def _choice(index: int, content: Json, logprobs: Json | None, reason: str | None) -> Json:
    return {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}
