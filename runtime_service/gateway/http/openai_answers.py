"""Events of generations as OpenAI's clients read them: one body, or chunks of a stream.

The two endpoints differ in how a choice looks, and in nothing else: a `Shape` each.
Source: OpenAI API reference, "The chat completion object", "The chat completion chunk object",
"The completion object".
"""

import codecs
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from millrace.runtime.v1 import runtime_pb2 as pb

Json = dict[str, Any]

_utf8_decoder = codecs.getincrementaldecoder("utf-8")
# JSON has no infinity; OpenAI writes this for what cannot be.
LEAST_LOGPROB = -9999.0

_REASONS = {
    pb.FINISH_REASON_STOP_TOKEN: "stop",
    pb.FINISH_REASON_STOP_STRING: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_CANCELLED: "stop",
}


class Shape(Protocol):
    """How one endpoint writes choices."""

    id_prefix: str
    object: str
    chunk_object: str

    def first(self) -> Json | None:
        """What a streamed choice begins with, if anything."""

    def delta(self, text: str) -> Json:
        """More of a streamed choice."""

    def whole(self, text: str) -> Json:
        """All of a choice."""

    def logprobs(self, rows: Sequence[pb.TokenLogprob], offsets: Sequence[int]) -> Json:
        """Log probabilities; `offsets` say where in the choice's text each token begins."""


class ChatShape:
    """/v1/chat/completions."""

    id_prefix, object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def first(self) -> Json | None:
        """Who speaks."""
        return {"delta": {"role": "assistant", "content": ""}}

    def delta(self, text: str) -> Json:
        """More of what is said."""
        return {"delta": {"content": text} if text else {}}

    def whole(self, text: str) -> Json:
        """The model's turn."""
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def logprobs(self, rows: Sequence[pb.TokenLogprob], offsets: Sequence[int]) -> Json:
        """An object a token."""
        content = [
            {**_token(row), "top_logprobs": [_token(candidate) for candidate in row.top]}
            for row in rows
        ]
        return {"content": content, "refusal": None}


class CompletionShape:
    """/v1/completions."""

    id_prefix, object, chunk_object = "cmpl-", "text_completion", "text_completion"

    def first(self) -> Json | None:
        """Nothing."""
        return None

    def delta(self, text: str) -> Json:
        """More of the text."""
        return {"text": text}

    def whole(self, text: str) -> Json:
        """The text."""
        return {"text": text}

    def logprobs(self, rows: Sequence[pb.TokenLogprob], offsets: Sequence[int]) -> Json:
        """A list each for what a token has."""
        return {
            "tokens": [_text(row.token) for row in rows],
            "token_logprobs": [_finite(row.logprob) for row in rows],
            # The token itself is among them, also where it is none of the likeliest.
            "top_logprobs": [
                {_text(top.token): _finite(top.logprob) for top in row.top}
                | {_text(row.token): _finite(row.logprob)}
                for row in rows
            ],
            "text_offset": list(offsets),
        }


@dataclass(slots=True)
class _Choice:
    texts: list[str] = field(default_factory=list)
    rows: list[pb.TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    num_chars: int = 0
    decode: Callable[[bytes], str] = field(default_factory=lambda: _utf8_decoder("replace").decode)

    def offsets(self, rows: Iterable[pb.TokenLogprob]) -> list[int]:
        """Where the tokens of `rows`, which come after those before, begin in the text."""
        offsets = []
        for row in rows:
            offsets.append(self.num_chars)
            self.num_chars += len(self.decode(row.token))
        return offsets


class Answer:
    """One request's answer, from its generations' events.

    Args:
        model: as it was asked for; "" tells what answers.
        num_samples: of each generation; choices are numbered through all of them.
        has_usage: a stream says at its end what was used.
    """

    def __init__(self, shape: Shape, model: str, num_samples: int, has_usage: bool) -> None:
        self._shape, self._has_usage = shape, has_usage
        self._num_samples = num_samples
        self._choices: dict[int, _Choice] = defaultdict(_Choice)
        self._usage = pb.Usage()
        self._head: Json = {
            "id": shape.id_prefix + uuid.uuid4().hex,
            "object": shape.object,
            "created": int(time.time()),
            "model": model,
        }

    def take(self, events: Iterable[pb.Event]) -> None:
        """Keeps what `events` say, for `body`."""
        for event in events:
            kind = event.WhichOneof("event")
            if kind == "started":
                self._on_started(event.started)
            elif kind == "tokens":
                choice = self._choices[self._index(event, event.tokens.sample_index)]
                choice.texts.append(event.tokens.text)
                choice.rows.extend(event.tokens.logprobs)
            else:
                self._on_finished(event.finished)
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

    def chunks(self, events: Iterable[pb.Event]) -> list[Json]:
        """What `events` add to a stream."""
        chunks: list[Json] = []
        for event in events:
            kind = event.WhichOneof("event")
            if kind == "started":
                self._on_started(event.started)
                if (first := self._shape.first()) is not None:
                    samples = range(self._num_samples)
                    chunks += [self._chunk(self._index(event, s), first) for s in samples]
            elif kind == "tokens":
                index = self._index(event, event.tokens.sample_index)
                text, rows = event.tokens.text, event.tokens.logprobs
                if text or rows:
                    chunks.append(self._chunk(index, self._shape.delta(text), rows))
            else:
                self._on_finished(event.finished)
                for finish in event.finished.samples:
                    index = self._index(event, finish.sample_index)
                    end = self._shape.delta("")
                    chunks.append(self._chunk(index, end, reason=_REASONS[finish.reason]))
        return chunks

    def last_chunks(self) -> list[Json]:
        """What a stream ends with."""
        if not self._has_usage:
            return []
        return [self._stream_head() | {"choices": [], "usage": self._used()}]

    def _chunk(
        self,
        index: int,
        content: Json,
        rows: Sequence[pb.TokenLogprob] = (),
        reason: str | None = None,
    ) -> Json:
        logprobs = self._logprobs(self._choices[index], rows)
        chunk = self._stream_head() | {"choices": [_choice(index, content, logprobs, reason)]}
        return chunk | {"usage": None} if self._has_usage else chunk

    def _logprobs(self, choice: _Choice, rows: Sequence[pb.TokenLogprob]) -> Json | None:
        return self._shape.logprobs(rows, choice.offsets(rows)) if rows else None

    def _stream_head(self) -> Json:
        return self._head | {"object": self._shape.chunk_object}

    def _index(self, event: pb.Event, sample_index: int) -> int:
        return int(event.request_id) * self._num_samples + sample_index

    def _on_started(self, started: pb.GenerationStarted) -> None:
        # The same engine and seed give the same tokens: what OpenAI calls a fingerprint.
        self._head["system_fingerprint"] = "fp_" + started.engine.rpartition("/")[2][:12]

    def _on_finished(self, finished: pb.GenerationFinished) -> None:
        usage = finished.usage
        self._usage.prompt_tokens += usage.prompt_tokens
        self._usage.cached_prompt_tokens += usage.cached_prompt_tokens
        self._usage.generated_tokens += usage.generated_tokens

    def _used(self) -> Json:
        usage = self._usage
        return {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.generated_tokens,
            "total_tokens": usage.prompt_tokens + usage.generated_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_prompt_tokens},
        }


def _choice(index: int, content: Json, logprobs: Json | None, reason: str | None) -> Json:
    return {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}


def _token(row: pb.TokenLogprob | pb.TopLogprob) -> Json:
    return {
        "token": _text(row.token),
        "logprob": _finite(row.logprob),
        "bytes": list(row.token),
    }


def _text(token: bytes) -> str:
    """The token's text; of a part of a character its bytes, spelled as OpenAI spells them."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
