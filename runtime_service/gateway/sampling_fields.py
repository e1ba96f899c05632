"""How to generate, in the names that other protocols have for it; shared by those that gateways speak.

Values are checked where all starts are, in `validation`. Sources: OpenAI API reference; below the
line in `Sampling`, vLLM's `SamplingParams`.
"""

import json
import re
from collections.abc import Iterable, MutableSequence
from typing import TypeVar

import msgspec
from millrace.runtime.v1 import runtime_pb2 as pb

from shared.errors import InvalidField, MillraceError

# Fields of a start whose name is another one here; the others end in their own.
_NAMES = {
    "start.prompt": "prompt",
    "start.text": "prompt",
    "start.token_ids.ids": "prompt",
    "start.chat": "messages",
    "start.chat.messages": "messages",
    "start.chat.template_arguments": "chat_template_kwargs",
    "start.stop.strings": "stop",
    "start.stop.token_ids": "stop_token_ids",
    "start.stop.max_new_tokens": "max_tokens",
    "start.stop.min_new_tokens": "min_tokens",
}

# What msgspec says of a field that is no struct's, or that a struct lacks; a name may be any text.
_MISFIT = re.compile(r"Object (contains unknown|missing required) field `(.*)`", re.DOTALL)
_MAX_NAME_CHARS = 64
_SURROGATE = re.compile("[\ud800-\udfff]")

# vLLM's and SGLang's word for no limit, where ours is 0.
_ALL_TOKENS = -1


class Sampling(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Fields of a request; None is what a generation does unasked."""

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


def set_sampling(start: pb.StartGeneration, request: Sampling, max_tokens: int | None) -> None:
    """Says in `start` what `request` says.

    Args:
        max_tokens: in place of the request's, for it has a default.
    Raises:
        InvalidField: a value is none that could be sent.
    """
    sampling, stop = start.sampling, start.stop
    for name in ("max_tokens", "n"):
        if (value := getattr(request, name)) is not None:
            check_least(value, 1, name)
    # Unset it is 1 for OpenAI's clients, and 0 for ours.
    sampling.temperature = 1.0 if request.temperature is None else request.temperature
    for name in (
        "top_p", "n", "presence_penalty", "frequency_penalty", "top_k", "min_p",
        "repetition_penalty",
    ):  # fmt: skip
        if (value := getattr(request, name)) is not None:
            setattr(sampling, name, checked(value, name))
    if sampling.top_k == _ALL_TOKENS:
        sampling.top_k = 0
    if request.seed is not None:
        sampling.seed = request.seed % (1 << 64)
    for token, bias in (request.logit_bias or {}).items():
        if not (token.isascii() and token.isdigit() and len(token) <= 10):
            raise InvalidField(field="logit_bias", problem=f"{token!r} is no token id")
        sampling.logit_bias[checked(int(token), "logit_bias")] = bias
    stop.max_new_tokens = checked(max_tokens or 0, "max_tokens")
    stop.min_new_tokens = checked(request.min_tokens or 0, "min_tokens")
    stop.ignore_end_tokens = bool(request.ignore_eos)
    extend(stop.token_ids, request.stop_token_ids or (), "stop_token_ids")
    stop.strings.extend([request.stop] if isinstance(request.stop, str) else request.stop or ())
    start.priority = checked(request.priority or 0, "priority")


def renamed(error: MillraceError) -> MillraceError:
    """`error` with the field's name that its client used."""
    if not isinstance(error, InvalidField):
        return error
    field = error.fields["field"]
    name = _NAMES.get(field, field.removeprefix("start.").removeprefix("sampling."))
    return InvalidField(field=name, problem=error.fields["problem"])


def misfit(error: msgspec.ValidationError, whole: str) -> InvalidField:
    """What `error` says, with the name of the field that it is about.

    Args:
        whole: what it is called where that is no field of it.
    """
    problem, _, path = str(error).partition(" - at `$")
    field = path.strip("`").lstrip(".")
    if (found := _MISFIT.fullmatch(problem)) is None:
        return InvalidField(field=field or whole, problem=problem[0].lower() + problem[1:])
    name = _shown(found[2])
    is_unknown = found[1].endswith("unknown")
    where = f"{field}.{name}" if field else name
    return InvalidField(field=where, problem="is not known" if is_unknown else "must be given")


def _shown(name: str) -> str:
    """A field's name, which may be any text, as errors have it."""
    if name.isprintable() and len(name) <= _MAX_NAME_CHARS:
        return name
    return repr(name[:_MAX_NAME_CHARS])


def no_json(body: bytes | str, error: Exception, whole: str) -> InvalidField:
    """What to say of a body that the decoder refuses with `error`.

    Half of a surrogate pair passes for JSON with some encoders, and for text with none: the field
    that has it is named.

    Args:
        whole: what the body is called.
    """
    try:
        found = _torn(json.loads(body), "")
    except (ValueError, RecursionError):
        found = None
    if found is None:
        return InvalidField(field=whole, problem=f"is not JSON: {error}")
    return InvalidField(field=_shown(found) or whole, problem="has half of a UTF-16 surrogate pair")


def _torn(value: object, where: str) -> str | None:
    """Where in `value` there is text that is no Unicode."""
    if isinstance(value, str):
        return where if _SURROGATE.search(value) else None
    if isinstance(value, dict):
        if any(_SURROGATE.search(name) for name in value):
            return where
        inside = ((one, f"{where}.{name}" if where else name) for name, one in value.items())
    elif isinstance(value, list):
        inside = ((one, f"{where}[{place}]") for place, one in enumerate(value))
    else:
        return None
    return next((found for one, place in inside if (found := _torn(one, place)) is not None), None)


Number = TypeVar("Number", int, float)


def checked(value: Number, field: str) -> Number:
    """`value`, which the wire can carry; whether it makes sense is checked elsewhere."""
    if isinstance(value, int) and not -(1 << 31) <= value < 1 << 31:
        raise InvalidField(field=field, problem=f"is out of range, found {value}")
    return value


def check_least(value: int, least: int, field: str) -> None:
    """Raises InvalidField where `value` is less."""
    if value < least:
        raise InvalidField(field=field, problem=f"must be at least {least}, found {value}")


def extend(token_ids: MutableSequence[int], found: Iterable[int], field: str) -> None:
    """Adds what was found; raises InvalidField where that is no token ids."""
    try:
        token_ids.extend(found)
    except ValueError:
        raise InvalidField(field=field, problem="must be token ids, from 0 on") from None
