"""What OpenAI's clients ask for, as starts of generations.

Fields that mean something here are those of the structs; what asks for nothing, or for what
cannot be given, is in the tables. A field in neither is refused: an answer that passes over a part
of the question is another question's.
Source: OpenAI API reference, "Chat" and "Completions".
"""

import json
from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec
from millrace.runtime.v1 import runtime_pb2 as pb

from runtime_service.gateway.sampling_fields import (
    Sampling,
    check_least,
    checked,
    extend,
    misfit,
    no_json,
    set_sampling,
)
from runtime_service.scheduling.request import MAX_TOP_LOGPROBS
from shared.errors import InvalidField

# One request, however many prompts it has, is one call.
MAX_PROMPTS = 256
# What OpenAI's older endpoint generates where it is not told.
DEFAULT_COMPLETION_TOKENS = 16

# About the caller, or the answer's place in a service that this is not: taken, and without effect.
_IGNORED = (
    "metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention",
    "request_id", "rid", "safety_identifier", "separate_reasoning", "service_tier",
    "stream_reasoning", "user",
)  # fmt: skip
_NO_TOOLS = "tools cannot be called yet"
_TEXT_ONLY = "answers can be text only"
_NOT_ENFORCED = "answers cannot be made to follow it yet"
_TEMPLATE = "messages go through the model's own template, as it is"
_ARGUMENTS = "is not told by itself; chat_template_kwargs takes it, where the model's template does"
_THINKING = "thinking is text like any other, and as the model's own template has it; chat_template_kwargs tells that"
_NO_LOOP = "repetition is not looked for; penalties make it unlikely"
_HIDDEN = "special tokens are never part of the text"
_OVER_GRPC = "is not told here; millrace.runtime.v1 has it"
# What cannot be done, the values that do not ask for it, and what to say of all others.
_Refusals = dict[str, tuple[tuple[object, ...], str]]
_REFUSED: _Refusals = {
    "tools": (([],), _NO_TOOLS),
    "tool_choice": (("none", "auto"), _NO_TOOLS),
    "functions": (([],), _NO_TOOLS),
    "function_call": (("none", "auto"), _NO_TOOLS),
    "response_format": (({"type": "text"},), "answers can be text only; JSON cannot be enforced yet"),
    "modalities": ((["text"],), _TEXT_ONLY),
    "audio": ((), _TEXT_ONLY),
    "prediction": ((), "predicted outputs are not supported"),
    "reasoning_effort": ((), "is not supported; say it in the messages"),
    "verbosity": (("medium",), "is not supported; say it in the messages"),
    "web_search_options": ((), "there is no web search"),
    "store": ((False,), "answers are not stored"),
    "best_of": ((1,), "all samples are returned; use n"),
    "echo": ((False,), "the prompt is not sent back"),
    "suffix": (("",), "text is continued, not filled in"),
    # Not OpenAI's, and known to clients of vLLM or SGLang.
    **dict.fromkeys(
        (
            "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
            "structural_tag", "json_schema", "regex", "ebnf",
        ),
        ((), _NOT_ENFORCED),
    ),
    "chat_template": ((), _TEMPLATE),
    "documents": (([],), _ARGUMENTS),
    "mm_processor_kwargs": (({},), _TEXT_ONLY),
    "add_generation_prompt": ((True,), _TEMPLATE),
    "continue_final_message": ((False,), _TEMPLATE),
    "skip_special_tokens": ((True,), _HIDDEN),
    "spaces_between_special_tokens": ((True,), _HIDDEN),
    "include_stop_str_in_output": ((False,), "text ends before what stops it"),
    "no_stop_trim": ((False,), "text ends before what stops it"),
    "use_beam_search": ((False,), "there is no beam search; draw samples with n"),
    "length_penalty": ((1, 1.0), "there is no beam search"),
    "bad_words": (([],), "words cannot be banned; tokens can, by logit_bias"),
    "allowed_token_ids": (([],), "other tokens cannot be ruled out; logit_bias favours tokens"),
    "truncate_prompt_tokens": ((), "a prompt that is too long is refused, not cut"),
    "prompt_logprobs": ((), _OVER_GRPC),
    "return_token_ids": ((False,), _OVER_GRPC),
    "return_tokens_as_token_ids": ((False,), _OVER_GRPC),
    "return_hidden_states": ((False,), "hidden states are not kept"),
    "cache_salt": ((), "prefixes are kept apart by tenant, as its key says"),
    "lora_path": ((), "adapters are not supported"),
    "logits_processors": (([],), "the engine runs no code of requests"),
    "custom_logit_processor": ((), "the engine runs no code of requests"),
    **dict.fromkeys(("thinking", "enable_thinking", "thinking_token_budget"), ((), _THINKING)),
    "include_reasoning": ((True,), _THINKING),
    "stop_regex": ((), "text ends at strings and tokens; use stop"),
    **dict.fromkeys(
        ("max_repetition_pattern_size", "min_repetition_pattern_size", "repetition_min_count"),
        ((0,), _NO_LOOP),
    ),
    "kv_transfer_params": ((), "prefill and decode are not apart here"),
    "vllm_xargs": (({},), "is not supported"),
}  # fmt: skip
_TOKENIZED = "prompts are tokenized as they always are"
# What asks for nothing, or cannot be done, at one endpoint alone.
_REFUSED_IN: dict[str, _Refusals] = {
    "ChatRequest": {"add_special_tokens": ((False,), _TOKENIZED)},
    "CompletionRequest": {
        "add_special_tokens": ((True,), _TOKENIZED),
        "chat_template_kwargs": (({},), "prompts go through no template; chats do"),
    },
}
_REFUSED_IN_MESSAGES: _Refusals = {
    "tool_calls": (([],), _NO_TOOLS),
    "tool_call_id": ((), _NO_TOOLS),
    "function_call": ((), _NO_TOOLS),
    "audio": ((), "messages can be text only"),
    **dict.fromkeys(("prefix", "partial"), ((False,), _TEMPLATE)),
}
# What other servers' answers have beside their text, and clients send back with it. Of what a model thought
# in earlier turns its template shows nothing in later ones.
_IGNORED_IN_MESSAGES = (
    "annotations", "cache_control", "name", "provider_specific_fields", "reasoning",
    "reasoning_content", "refusal", "thinking_blocks",
)  # fmt: skip
_TOOL_ROLES = ("tool", "function")


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """How an answer is streamed; `continuous_usage_stats` is vLLM's, as its clients send it."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


class Common(Sampling, kw_only=True):
    """What both kinds of requests have."""

    model: str = ""
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class Part(msgspec.Struct):
    """A part of a message."""

    type: str
    text: str | None = None


class Message(msgspec.Struct, forbid_unknown_fields=True):
    """A turn of a conversation."""

    role: str
    content: str | list[Part] | None = None


class ChatRequest(Common, kw_only=True):
    """Body of /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    # vLLM's and SGLang's.
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionRequest(Common, kw_only=True):
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
        raise no_json(body, error, "body") from None
    if not isinstance(fields, dict):
        raise InvalidField(field="body", problem="must be a JSON object")
    _drop(fields, {**_REFUSED, **_REFUSED_IN[kind.__name__]}, _IGNORED, "")
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
        raise misfit(error, "body") from None


def starts_of_chat(request: ChatRequest) -> list[pb.StartGeneration]:
    """The one generation of a chat.

    Raises:
        InvalidField: fields contradict each other, or a message is not text.
    """
    start = _begun(request, request.max_completion_tokens or request.max_tokens)
    start.request_id = "0"
    if request.max_completion_tokens is not None:
        check_least(request.max_completion_tokens, 1, "max_completion_tokens")
    start.sampling.logprobs = bool(request.logprobs)
    if request.top_logprobs:
        if not request.logprobs:
            raise InvalidField(field="top_logprobs", problem="needs logprobs")
        start.sampling.top_logprobs = checked(request.top_logprobs, "top_logprobs")
    start.chat.SetInParent()
    if request.chat_template_kwargs:
        start.chat.template_arguments = _written(request.chat_template_kwargs)
    for place, message in enumerate(request.messages):
        # `developer` is what OpenAI calls the role that templates know as `system`.
        role = "system" if message.role == "developer" else message.role
        start.chat.messages.add(role=role, content=_text_of(message, place))
    return [start]


def _written(template_arguments: dict[str, Any]) -> str:
    try:
        return json.dumps(template_arguments, ensure_ascii=False)
    except RecursionError:  # what could just be read
        problem = "is nested too deeply"
        raise InvalidField(field="chat_template_kwargs", problem=problem) from None


def starts_of_completion(request: CompletionRequest) -> list[pb.StartGeneration]:
    """A generation for each prompt, named by its place.

    Raises:
        InvalidField: a prompt is neither text nor token ids, or there are none or too many.
    """
    shared = _begun(request, request.max_tokens or DEFAULT_COMPLETION_TOKENS)
    if request.logprobs is not None:
        if not 0 <= request.logprobs <= MAX_TOP_LOGPROBS:
            problem = f"must be from 0 to {MAX_TOP_LOGPROBS}, found {request.logprobs}"
            raise InvalidField(field="logprobs", problem=problem)
        shared.sampling.logprobs = True
        shared.sampling.top_logprobs = request.logprobs
    starts = []
    for place, prompt in enumerate(_prompts(request.prompt)):
        start = pb.StartGeneration()
        start.CopyFrom(shared)
        start.request_id = str(place)
        if isinstance(prompt, str):
            start.text = prompt
        else:
            extend(start.token_ids.ids, prompt, "prompt")
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
    field, content = f"messages[{place}].content", message.content
    if content is None:
        # What an assistant said may be beside its content, as answers of other servers have it.
        if message.role != "assistant":
            raise InvalidField(field=field, problem="must be given")
        return ""
    if isinstance(content, str):
        return content
    texts = []
    for number, part in enumerate(content):
        if part.type != "text":
            raise InvalidField(field=field, problem=f"must be text, found {part.type!r}")
        if part.text is None:
            raise InvalidField(field=f"{field}[{number}].text", problem="must be given")
        texts.append(part.text)
    return "".join(texts)


def _begun(request: Common, max_tokens: int | None) -> pb.StartGeneration:
    """A start without its prompt."""
    if request.stream_options is not None and not request.stream:
        raise InvalidField(field="stream_options", problem="needs stream")
    start = pb.StartGeneration(model=request.model)
    set_sampling(start, request, max_tokens)
    return start


def _drop(
    fields: dict[str, Any],
    refused: _Refusals,
    ignored: tuple[str, ...],
    where: str,
) -> None:
    """Takes out what means nothing here, and null, by which clients write what is unset.

    Raises:
        InvalidField: what is left out would be missed.
    """
    for name in [name for name, value in fields.items() if value is None]:
        del fields[name]
    for name in ignored:
        fields.pop(name, None)
    for name, (neutral, problem) in refused.items():
        value = fields.pop(name, None)
        if value is not None and value not in neutral:
            raise InvalidField(field=where + name, problem=problem)
