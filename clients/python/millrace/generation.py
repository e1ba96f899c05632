"""A generation as the SDK sees it: how it is asked for, and what comes back; pure.

Blocking, async and multiplexed streams all build their request with `start_generation` and feed
the events to a `Collector`.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict, Unpack

from google.protobuf.duration_pb2 import Duration

from millrace.errors import filled, from_status, invalid_field, not_utf8
from millrace.runtime.v1 import runtime_pb2 as pb

FinishReason = Literal["stop_token", "stop_string", "length", "cancelled", "unspecified"]


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


Prompt = str | Sequence[int] | Sequence[Message | Mapping[str, str]]
"""Text, token ids, or messages for the model's chat template: written out, or kept in a `dict`."""


class GenerateOptions(TypedDict, total=False):
    """Everything that can be asked of a generation; protos/millrace/runtime/v1 documents each.

    `stop` is a string or strings and `stop_token_ids` ids that end it; `timeout_s` counts queueing. Decoding
    is greedy unless `temperature` is set. `model` chooses a deployment or a model of a gateway.
    `template_arguments` are variables of the model's chat template, of JSON's types; they need messages.
    """

    max_new_tokens: int
    min_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int
    n: int
    logprobs: bool
    top_logprobs: int
    prompt_logprobs: bool
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_end_tokens: bool
    timeout_s: float
    priority: int
    model: str
    template_arguments: Mapping[str, object]


_PROMPTS = "a prompt is text, token ids or messages, and no mix of them"
_STOP_FIELDS = {
    "max_new_tokens": "max_new_tokens",
    "min_new_tokens": "min_new_tokens",
    "stop": "strings",
    "stop_token_ids": "token_ids",
    "ignore_end_tokens": "ignore_end_tokens",
}
# Of neither the stop conditions nor the sampling.
_OTHER_OPTIONS = ("timeout_s", "priority", "model", "template_arguments")
_STOP_OPTIONS = {field: option for option, field in _STOP_FIELDS.items()}


def start_generation(
    prompt: Prompt, request_id: str = "", **options: Unpack[GenerateOptions]
) -> pb.StartGeneration:
    """The wire form of what is asked.

    Raises:
        TypeError: an option does not exist, or has the wrong type.
        MillraceError: INVALID_FIELD, a number or text that no field of the wire holds.
    """
    if unknown := options.keys() - GenerateOptions.__annotations__.keys():
        raise TypeError(f"unknown option {sorted(unknown)[0]!r}")
    start = filled(
        pb.StartGeneration,
        request_id=request_id,
        priority=options.get("priority", 0),
        model=options.get("model", ""),
    )
    _set_prompt(start, prompt)
    if arguments := options.get("template_arguments"):
        _set_template_arguments(start, arguments)
    sampling: dict[str, object] = {}
    stop: dict[str, object] = {}
    for name, value in options.items():
        if name in _STOP_FIELDS:
            # A string is a sequence too: of its characters.
            is_one = name == "stop" and isinstance(value, str)
            stop[_STOP_FIELDS[name]] = [value] if is_one else value
        elif name not in _OTHER_OPTIONS:
            sampling[name] = value
    start.sampling.CopyFrom(filled(pb.SamplingParams, **sampling))
    start.stop.CopyFrom(filled(pb.StopConditions, _STOP_OPTIONS, **stop))
    if "timeout_s" in options:
        _set_timeout(start.timeout, options["timeout_s"])
    return start


def _set_template_arguments(start: pb.StartGeneration, arguments: Mapping[str, object]) -> None:
    if not start.HasField("chat"):
        raise invalid_field("template_arguments", "needs messages, which go through a template")
    try:
        written = json.dumps(dict(arguments), ensure_ascii=False, allow_nan=False)
    # No number of JSON's, an object that holds itself, or one that is too deep.
    except (ValueError, RecursionError) as error:
        raise invalid_field("template_arguments", f"is no JSON: {error}") from None
    try:
        start.chat.template_arguments = written
    except UnicodeEncodeError:
        raise not_utf8("template_arguments", written) from None


def _set_timeout(timeout: Duration, timeout_s: float) -> None:
    try:
        timeout.FromMilliseconds(round(timeout_s * 1000))
    except (ValueError, OverflowError):  # no number, or more than 10,000 years
        raise invalid_field("timeout_s", f"out of range, found {timeout_s}") from None


def _set_prompt(start: pb.StartGeneration, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        try:
            start.text = prompt
        except UnicodeEncodeError:
            raise not_utf8("prompt", prompt) from None
        return
    # Bytes would pass for token ids.
    if isinstance(prompt, bytes | bytearray) or not isinstance(prompt, Iterable):
        raise TypeError(f"{_PROMPTS}, found {type(prompt).__name__}")
    items: list[object] = list(prompt)
    if all(isinstance(item, int) for item in items):
        start.token_ids.CopyFrom(filled(pb.TokenIds, ids=items))
        return
    for place, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise TypeError(f"{_PROMPTS}, found {type(item).__name__} at {place}")
        role, content = item.get("role"), item.get("content")
        if not (isinstance(role, str) and isinstance(content, str)):
            raise TypeError(f"message {place} of the prompt needs role and content, both text")
        try:
            start.chat.messages.add(role=role, content=content)
        except UnicodeEncodeError:
            raise not_utf8(f"message {place} of the prompt", content) from None


@dataclass(frozen=True, slots=True)
class Chunk:
    """New tokens of one sample.

    Args:
        text: what they add to the text; may be empty while a character is unfinished.
        logprobs: one per token, when asked for.
        prompt_logprobs: one per prompt token after the first, when asked for; first chunk only.
    """

    text: str
    token_ids: tuple[int, ...]
    sample_index: int
    logprobs: tuple[pb.TokenLogprob, ...]
    prompt_logprobs: tuple[pb.TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """One whole answer. `stop_string` and `stop_token_id` say what ended it, where they did."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_string: str
    stop_token_id: int | None


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished generation.

    Args:
        seed: repeats it exactly.
        generated_tokens: over all samples.
        time_to_first_token_s: as the daemon counts it, queueing included.
        num_resumes: how often its connection was lost and it went on over another one.
    """

    samples: tuple[Sample, ...]
    seed: int
    prompt_tokens: int
    cached_prompt_tokens: int
    generated_tokens: int
    queued_s: float
    time_to_first_token_s: float
    total_s: float
    num_resumes: int = 0

    @property
    def text(self) -> str:
        """The first sample's text."""
        return self.samples[0].text

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second after the first token; 0 where there was at most one."""
        decoding_s = self.total_s - self.time_to_first_token_s
        rest = self.generated_tokens - len(self.samples)
        return rest / decoding_s if rest > 0 and decoding_s > 0 else 0.0


class Collector:
    """Turns the events of one generation into chunks, and at the end into a `Generation`.

    Args:
        generation_id: of one that is resumed; the server names others.
        received_tokens: that the reader had of it before, by sample.
    """

    def __init__(self, generation_id: str = "", received_tokens: Sequence[int] = ()) -> None:
        self.generation_id = generation_id
        self.received_tokens = list(received_tokens)
        self.num_events = 0
        self.has_started = False
        self.result: Generation | None = None
        self._seed = 0
        self._texts: dict[int, list[str]] = {}
        self._token_ids: dict[int, list[int]] = {}

    def take(self, event: pb.Event) -> Chunk | None:
        """The chunk that `event` brings, if it is one.

        Raises:
            MillraceError: the generation failed.
        """
        kind = event.WhichOneof("event")
        if kind == "error":
            raise from_status(event.error)
        self.num_events += 1
        self.has_started = True
        if kind == "started":
            self._seed = event.started.seed
            self.generation_id = event.started.generation_id
        elif kind == "tokens":
            return self._take_tokens(event.tokens)
        elif kind == "finished":
            self.result = self._finish(event.finished)
        return None

    def take_all(self, events: Iterable[pb.Event]) -> Iterator[Chunk]:
        """The chunks that `events` bring; nothing follows the end."""
        for event in events:
            if self.result is None and (chunk := self.take(event)) is not None:
                yield chunk

    def _take_tokens(self, tokens: pb.TokenChunk) -> Chunk:
        index, ids = tokens.sample_index, tuple(tokens.token_ids)
        self.received_tokens += [0] * (index + 1 - len(self.received_tokens))
        self.received_tokens[index] += len(ids)
        self._texts.setdefault(index, []).append(tokens.text)
        self._token_ids.setdefault(index, []).extend(ids)
        return Chunk(tokens.text, ids, index, tuple(tokens.logprobs), tuple(tokens.prompt_logprobs))

    def _finish(self, finished: pb.GenerationFinished) -> Generation:
        usage, timings = finished.usage, finished.timings
        return Generation(
            samples=tuple(
                Sample(
                    text="".join(self._texts.get(sample.sample_index, ())),
                    token_ids=tuple(self._token_ids.get(sample.sample_index, ())),
                    finish_reason=_finish_reason(sample.reason),
                    stop_string=sample.stop_string,
                    stop_token_id=(
                        sample.stop_token_id if sample.HasField("stop_token_id") else None
                    ),
                )
                for sample in sorted(finished.samples, key=lambda sample: sample.sample_index)
            ),
            seed=self._seed,
            prompt_tokens=usage.prompt_tokens,
            cached_prompt_tokens=usage.cached_prompt_tokens,
            generated_tokens=usage.generated_tokens,
            queued_s=_seconds(timings.queued),
            time_to_first_token_s=_seconds(timings.time_to_first_token),
            total_s=_seconds(timings.total),
        )


def _finish_reason(reason: "pb.FinishReason.ValueType") -> FinishReason:
    if reason not in pb.FinishReason.values():
        return "unspecified"  # a newer server's
    name = pb.FinishReason.Name(reason).removeprefix("FINISH_REASON_").lower()
    return name  # type: ignore[return-value]


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9
