"""What OpenAI's clients ask for, as starts of generations.

Fields that mean something here are those of the two structs; what asks for nothing, or for what
cannot be given, is in the tables. A field in neither is refused: an answer that passes over a part
of the question is another question's. Values are checked where all starts are, in `validation`.
Sources: OpenAI API reference, "Chat" and "Completions"; below the line in `Sampling`, vLLM's
"extra parameters".
"""

from collections.abc import Iterable, Iterator, MutableSequence
from typing import Any, TypeVar

import msgspec
from millrace.runtime.v1 import runtime_pb2 as pb

from shared.errors import InvalidField

# One request, however many prompts it has, is one call.
MAX_PROMPTS = 256
# What OpenAI's older endpoint generates where it is not told.
DEFAULT_COMPLETION_TOKENS = 16

# About the caller, or the answer's place in a service that this is not: taken, and without effect.
_IGNORED = (
    "metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention",
    "safety_identifier", "service_tier", "user",
)  # fmt: skip
_NO_TOOLS = "tools cannot be called yet"
# What cannot be done, the values that do not ask for it, and what to say of all others.
_Refusals = dict[str, tuple[tuple[object, ...], str]]
_REFUSED: _Refusals = {
    "tools": (([],), _NO_TOOLS),
    "tool_choice": (("none", "auto"), _NO_TOOLS),
    "functions": (([],), _NO_TOOLS),
    "function_call": (("none", "auto"), _NO_TOOLS),
    "response_format": (({"type": "text"},), "answers can be text only; JSON cannot be enforced yet"),
    "modalities": ((["text"],), "answers can be text only"),
    "audio": ((), "answers can be text only"),
    "prediction": ((), "predicted outputs are not supported"),
    "reasoning_effort": ((), "is not supported; say it in the messages"),
    "verbosity": ((), "is not supported; say it in the messages"),
    "web_search_options": ((), "there is no web search"),
    "store": ((False,), "answers are not stored"),
    "best_of": ((1,), "all samples are returned; use n"),
    "echo": ((False,), "the prompt is not sent back"),
    "suffix": (("",), "text is continued, not filled in"),
}  # fmt: skip
_REFUSED_IN_MESSAGES: _Refusals = {
    "tool_calls": (([],), _NO_TOOLS),
    "tool_call_id": ((), _NO_TOOLS),
    "function_call": ((), _NO_TOOLS),
    "audio": ((), "messages can be text only"),
}
_IGNORED_IN_MESSAGES = ("annotations", "name", "refusal")
_TOOL_ROLES = ("tool", "function")


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """How an answer is streamed."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Sampling(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What both kinds of requests have."""

    model: str = ""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    # Not OpenAI's.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    priority: int | None = None


class Part(msgspec.Struct):
    """A part of a message."""

    type: str
    text: str = ""


class Message(msgspec.Struct, forbid_unknown_fields=True):
    """A turn of a conversation."""

    role: str
    content: str | list[Part] | None = None


class ChatRequest(Sampling, kw_only=True):
    """Body of /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class CompletionRequest(Sampling, kw_only=True):
    """Body of /v1/completions. One prompt is a text or token ids; several are a list of such."""

    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None


Request = TypeVar("Request", ChatRequest, CompletionRequest)


def parse(body: bytes, kind: type[Request]) -> Request:
    """The request in `body`.

    Raises:
        InvalidField: it is no JSON object, or a field is unknown, refused or of another type.
    """
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidField(field="body", problem=f"is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise InvalidField(field="body", problem="must be a JSON object")
    _drop(fields, _REFUSED, _IGNORED, "")
    messages = fields.get("messages")
    for place, message in enumerate(messages if isinstance(messages, list) else ()):
        if isinstance(message, dict):
            where = f"messages[{place}]."
            if message.get("role") in _TOOL_ROLES:
                raise InvalidField(field=f"{where}role", problem=_NO_TOOLS)
            _drop(message, _REFUSED_IN_MESSAGES, _IGNORED_IN_MESSAGES, where)
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at `$")
        field = path.strip("`").lstrip(".") or "body"
        raise InvalidField(field=field, problem=problem[0].lower() + problem[1:]) from None


def starts_of_chat(request: ChatRequest) -> list[pb.StartGeneration]:
    """The one generation of a chat.

    Raises:
        InvalidField: fields contradict each other, or a message is not text.
    """
    start = pb.StartGeneration(request_id="0")
    _set_sampling(start, request, request.max_completion_tokens or request.max_tokens)
    if request.max_completion_tokens is not None:
        _check_least(request.max_completion_tokens, 1, "max_completion_tokens")
    start.sampling.logprobs = bool(request.logprobs)
    if request.top_logprobs:
        if not request.logprobs:
            raise InvalidField(field="top_logprobs", problem="needs logprobs")
        start.sampling.top_logprobs = _checked(request.top_logprobs, "top_logprobs")
    start.chat.SetInParent()
    for place, message in enumerate(request.messages):
        # `developer` is what OpenAI calls the role that templates know as `system`.
        role = "system" if message.role == "developer" else message.role
        start.chat.messages.add(role=role, content=_text_of(message, place))
    return [start]


def starts_of_completion(request: CompletionRequest) -> list[pb.StartGeneration]:
    """A generation for each prompt, named by its place.

    Raises:
        InvalidField: a prompt is neither text nor token ids, or there are none or too many.
    """
    shared = pb.StartGeneration()
    _set_sampling(shared, request, request.max_tokens or DEFAULT_COMPLETION_TOKENS)
    if request.logprobs is not None:
        shared.sampling.logprobs = True
        shared.sampling.top_logprobs = _checked(request.logprobs, "logprobs")
    starts = []
    for place, prompt in enumerate(_prompts(request.prompt)):
        start = pb.StartGeneration()
        start.CopyFrom(shared)
        start.request_id = str(place)
        if isinstance(prompt, str):
            start.text = prompt
        else:
            _extend(start.token_ids.ids, prompt, "prompt")
            start.token_ids.SetInParent()
        starts.append(start)
    if not 1 <= len(starts) <= MAX_PROMPTS:
        problem = f"must be from 1 to {MAX_PROMPTS} prompts, found {len(starts)}"
        raise InvalidField(field="prompt", problem=problem)
    return starts


def _prompts(prompt: str | list[str | int | list[int]]) -> Iterator[str | list[int]]:
    if isinstance(prompt, str):
        yield prompt
        return
    token_ids = [one for one in prompt if isinstance(one, int)]
    if token_ids and len(token_ids) == len(prompt):
        yield token_ids
        return
    for one in prompt:
        if isinstance(one, int):
            raise InvalidField(field="prompt", problem="mixes token ids with prompts")
        yield one


def _text_of(message: Message, place: int) -> str:
    if not isinstance(message.content, list):
        return message.content or ""
    for part in message.content:
        if part.type != "text":
            field = f"messages[{place}].content"
            raise InvalidField(field=field, problem=f"must be text, found {part.type!r}")
    return "".join(part.text for part in message.content)


def _set_sampling(start: pb.StartGeneration, request: Sampling, max_tokens: int | None) -> None:
    sampling, stop = start.sampling, start.stop
    start.model = request.model
    if request.stream_options is not None and not request.stream:
        raise InvalidField(field="stream_options", problem="needs stream")
    for name in ("max_tokens", "n"):
        if (value := getattr(request, name)) is not None:
            _check_least(value, 1, name)
    # Unset it is 1 for OpenAI's clients, and 0 for ours.
    sampling.temperature = 1.0 if request.temperature is None else request.temperature
    for name in (
        "top_p", "n", "presence_penalty", "frequency_penalty", "top_k", "min_p",
        "repetition_penalty",
    ):  # fmt: skip
        if (value := getattr(request, name)) is not None:
            setattr(sampling, name, _checked(value, name))
    if request.seed is not None:
        sampling.seed = request.seed % (1 << 64)
    for token, bias in (request.logit_bias or {}).items():
        if not (token.isascii() and token.isdigit()):
            raise InvalidField(field="logit_bias", problem=f"{token!r} is no token id")
        sampling.logit_bias[_checked(int(token), "logit_bias")] = bias
    stop.max_new_tokens = _checked(max_tokens or 0, "max_tokens")
    stop.min_new_tokens = _checked(request.min_tokens or 0, "min_tokens")
    stop.ignore_end_tokens = bool(request.ignore_eos)
    _extend(stop.token_ids, request.stop_token_ids or (), "stop_token_ids")
    stop.strings.extend([request.stop] if isinstance(request.stop, str) else request.stop or ())
    start.priority = _checked(request.priority or 0, "priority")


def _drop(
    fields: dict[str, Any],
    refused: _Refusals,
    ignored: tuple[str, ...],
    where: str,
) -> None:
    """Takes out what means nothing here.

    Raises:
        InvalidField: what is left out would be missed.
    """
    for name in ignored:
        fields.pop(name, None)
    for name, (neutral, problem) in refused.items():
        value = fields.pop(name, None)
        if value is not None and value not in neutral:
            raise InvalidField(field=where + name, problem=problem)


Number = TypeVar("Number", int, float)


def _checked(value: Number, field: str) -> Number:
    """`value`, which the wire can carry; whether it makes sense is checked elsewhere."""
    if isinstance(value, int) and not -(1 << 31) <= value < 1 << 31:
        raise InvalidField(field=field, problem=f"is out of range, found {value}")
    return value


def _check_least(value: int, least: int, field: str) -> None:
    if value < least:
        raise InvalidField(field=field, problem=f"must be at least {least}, found {value}")


def _extend(token_ids: MutableSequence[int], found: Iterable[int], field: str) -> None:
    try:
        token_ids.extend(found)
    except ValueError:
        raise InvalidField(field=field, problem="must be token ids, from 0 on") from None
