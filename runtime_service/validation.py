"""What a client may ask for: a start command in, the scheduler's terms out, or a clear refusal.

Every field's value is checked here and nowhere else (`shared.edge` refuses unknown fields). What
needs the prompt's tokens is checked once they are known, in `to_request`.
"""

import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec
from millrace.runtime.v1 import runtime_pb2 as pb

from runtime_service.limits import RuntimeLimits
from runtime_service.scheduling.request import (
    MAX_END_TOKENS,
    MAX_LOGIT_BIAS,
    MAX_TOP_LOGPROBS,
    Request,
    SamplingParams,
    StopParams,
)
from shared.errors import InvalidField, PromptTooLong

MAX_REQUEST_ID_BYTES = 256
MAX_SAMPLES = 64
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_BYTES = 256
MAX_PRIORITY = 100
MAX_TEMPLATE_ARGUMENTS_BYTES = 64 << 10
# Bytes of text in a token at least, on average, for an estimate of what a prompt costs.
_TOKEN_BYTES = 4
# Log probabilities of a prompt, candidates counted: they are kept until its first token, some 100 bytes each.
MAX_PROMPT_LOGPROBS = 1 << 18
MAX_CREDIT = 2**31 - 1
# Logits that are divided by less may become infinite, which no engine survives.
REPETITION_PENALTIES = 0.01, 100.0


@dataclass(frozen=True, slots=True)
class Start:
    """A start command that makes sense, whatever its prompt's length.

    Args:
        max_new_tokens: 0 means up to the engine's limit.
        end_token_ids: all that may end it, sorted; empty where they are ignored.
        sample_index: of the first sample, in the randomness key.
        sends_logprobs: of generated tokens; the engine also reports them for prompts' sake.
        credit_tokens: None = no limit.
    """

    sampling: SamplingParams
    sends_logprobs: bool
    num_samples: int
    max_new_tokens: int
    min_new_tokens: int
    end_token_ids: tuple[int, ...]
    stop_strings: tuple[str, ...]
    priority: int
    resumed_token_ids: list[int]
    sample_index: int
    credit_tokens: int | None


def check_request_id(request_id: str, field: str = "start.request_id") -> None:
    """Raises InvalidField unless `request_id` may name a generation of a call."""
    size = len(request_id.encode())
    _check(0 < size <= MAX_REQUEST_ID_BYTES, field, size, "must have 1 to 256 bytes")


def num_prompt_tokens_of(start: pb.StartGeneration) -> int:
    """How long a prompt is about, before anybody has tokenized it."""
    if start.WhichOneof("prompt") == "token_ids":
        return len(start.token_ids.ids)
    return start.ByteSize() // _TOKEN_BYTES


def is_too_long(start: pb.StartGeneration, max_sequence_tokens: int) -> bool:
    """Claims that its prompt can never run where sequences are so long; of text nobody knows before it is tokenized."""
    return len(start.token_ids.ids) >= max_sequence_tokens


def timeout_of(start: pb.StartGeneration) -> float | None:
    """Seconds that the generation may take, None = as long as it takes.

    Raises:
        InvalidField: it is not over 0.
    """
    if not start.HasField("timeout"):
        return None
    seconds = start.timeout.seconds + start.timeout.nanos / 1e9
    _check(seconds > 0, "start.timeout", f"{seconds} s", "must be over 0")
    return seconds


def credit_of(command: pb.StartGeneration | pb.ResumeGeneration, field: str) -> int | None:
    """Tokens that the client takes at first, None = without limit.

    Raises:
        InvalidField: it is negative.
    """
    credit = command.credit_tokens if command.HasField("credit_tokens") else None
    _check(credit is None or credit >= 0, field, credit, "must not be negative")
    return credit


def waits_apart(start: pb.StartGeneration) -> bool:
    """Claims that a full queue may have room for it: it waits for credit first, or goes on and may be at its end."""
    is_without_credit = start.HasField("credit_tokens") and start.credit_tokens == 0
    return is_without_credit or bool(start.resumed_token_ids)


def parse_start(
    start: pb.StartGeneration, vocab_size: int, model_end_token_ids: Iterable[int]
) -> Start:
    """What `start` asks for.

    Args:
        vocab_size: token ids are below it.
        model_end_token_ids: the model's own. Some checkpoints name tokens beyond their vocabulary: those are never
            drawn, and must not be masked.
    Raises:
        InvalidField: the first field that is wrong.
    """
    _check_prompt(start, vocab_size)
    check_token_ids(start.resumed_token_ids, vocab_size, "start.resumed_token_ids")
    sampling = start.sampling
    num_samples = sampling.n or 1
    _check_range(num_samples, 1, MAX_SAMPLES, "start.sampling.n")
    if start.resumed_token_ids:
        _check(num_samples == 1, "start.resumed_token_ids", f"n = {num_samples}", "needs n of 1")
    _check_range(start.sample_index, 0, MAX_SAMPLES - 1, "start.sample_index")
    if start.sample_index:
        _check(num_samples == 1, "start.sample_index", f"n = {num_samples}", "needs n of 1")
    stop = start.stop
    _check(stop.max_new_tokens >= 0, "start.stop.max_new_tokens", stop.max_new_tokens, "negative")
    _check(stop.min_new_tokens >= 0, "start.stop.min_new_tokens", stop.min_new_tokens, "negative")
    if stop.max_new_tokens:
        _check(
            stop.min_new_tokens <= stop.max_new_tokens,
            "start.stop.min_new_tokens",
            stop.min_new_tokens,
            f"must not exceed max_new_tokens, {stop.max_new_tokens}",
        )
    check_token_ids(stop.token_ids, vocab_size, "start.stop.token_ids")
    _check_range(start.priority, -MAX_PRIORITY, MAX_PRIORITY, "start.priority")
    model_ends = () if stop.ignore_end_tokens else model_end_token_ids
    drawn_ends = (token_id for token_id in model_ends if 0 <= token_id < vocab_size)
    end_token_ids = tuple(sorted({*stop.token_ids, *drawn_ends}))
    _check(
        len(end_token_ids) <= MAX_END_TOKENS,
        "start.stop.token_ids",
        len(end_token_ids),
        f"at most {MAX_END_TOKENS}, the model's own included",
    )
    # End tokens are masked at first: no engine survives logits that are all masked.
    _check(
        not stop.min_new_tokens or len(end_token_ids) < vocab_size,
        "start.stop.min_new_tokens",
        stop.min_new_tokens,
        "every token of the vocabulary ends a sample: none is left to begin with",
    )
    return Start(
        sampling=_parse_sampling(sampling, vocab_size),
        sends_logprobs=sampling.logprobs or sampling.top_logprobs > 0,
        num_samples=num_samples,
        max_new_tokens=stop.max_new_tokens,
        min_new_tokens=stop.min_new_tokens,
        end_token_ids=end_token_ids,
        stop_strings=_parse_stop_strings(stop.strings),
        priority=start.priority,
        resumed_token_ids=list(start.resumed_token_ids),
        sample_index=start.sample_index,
        credit_tokens=credit_of(start, "start.credit_tokens"),
    )


def check_update(update: pb.UpdateGeneration) -> None:
    """Raises InvalidField unless `update` makes sense."""
    if update.HasField("priority"):
        _check_range(update.priority, -MAX_PRIORITY, MAX_PRIORITY, "update.priority")
    if update.HasField("max_new_tokens"):
        _check_range(update.max_new_tokens, 1, MAX_CREDIT, "update.max_new_tokens")


def check_credit(credit: pb.AddCredit) -> None:
    """Raises InvalidField unless `credit` makes sense."""
    _check_range(credit.tokens, 1, MAX_CREDIT, "credit.tokens")


def check_token_ids(token_ids: Iterable[int], vocab_size: int, path: str) -> None:
    """Raises InvalidField where one of `token_ids` is none of the model's; none is negative."""
    largest = max(token_ids, default=0)
    _check(largest < vocab_size, path, largest, f"must be below the vocabulary's {vocab_size}")


def template_arguments_of(chat: pb.Chat) -> dict[str, Any]:
    """What the chat template is given beside the messages.

    Raises:
        InvalidField: it is no JSON object, or too long.
    """
    path, text = "start.chat.template_arguments", chat.template_arguments
    if not text:
        return {}
    size = len(text.encode())
    most = MAX_TEMPLATE_ARGUMENTS_BYTES
    _check(size <= most, path, f"{size} bytes", f"must be at most {most} bytes of JSON")
    try:
        arguments = msgspec.json.decode(text)
    # Half of a surrogate pair is a UnicodeDecodeError, and so a ValueError.
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise InvalidField(field=path, problem=f"is not JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise InvalidField(field=path, problem="must be a JSON object")
    return arguments


def to_request(
    start: Start, request_id: int, prompt_token_ids: list[int], limits: RuntimeLimits, salt: str
) -> Request:
    """`start` in the engine process's terms.

    Raises:
        InvalidField: the prompt is empty, or has more log probabilities than are kept.
        PromptTooLong: prompt and one new token exceed the engine's limit.
    """
    if not prompt_token_ids:
        raise InvalidField(field="start.prompt", problem="it has no tokens; send at least one")
    room = limits.max_sequence_tokens - len(prompt_token_ids)
    if room < 1:
        raise PromptTooLong(
            prompt_tokens=len(prompt_token_ids), max_sequence_tokens=limits.max_sequence_tokens
        )
    if start.sampling.prompt_logprobs:
        most = MAX_PROMPT_LOGPROBS // (1 + (start.sampling.num_logprobs or 0))
        found = f"{len(prompt_token_ids)} tokens"
        rule = f"with so many top_logprobs, prompts have at most {most} tokens"
        _check(len(prompt_token_ids) <= most, "start.sampling.prompt_logprobs", found, rule)
    return Request(
        request_id=request_id,
        prompt_token_ids=prompt_token_ids,
        sampling=start.sampling,
        stop=StopParams(
            max_new_tokens=min(start.max_new_tokens or room, room),
            min_new_tokens=start.min_new_tokens,
            end_token_ids=start.end_token_ids,
        ),
        resumed_token_ids=start.resumed_token_ids,
        num_samples=start.num_samples,
        first_sample_index=start.sample_index,
        priority=start.priority,
        cache_salt=salt,
        credit_tokens=start.credit_tokens,
    )


def _check_prompt(start: pb.StartGeneration, vocab_size: int) -> None:
    kind = start.WhichOneof("prompt")
    if kind is None:
        problem = "must be set: token_ids, text or chat"
        raise InvalidField(field="start.prompt", problem=problem)
    if kind == "token_ids":
        _check(bool(start.token_ids.ids), "start.token_ids.ids", "none", "needs at least one")
        check_token_ids(start.token_ids.ids, vocab_size, "start.token_ids.ids")
    elif kind == "text":
        _check(bool(start.text), "start.text", "none", "must not be empty")
    else:
        _check(bool(start.chat.messages), "start.chat.messages", "none", "needs at least one")


def _parse_sampling(raw: pb.SamplingParams, vocab_size: int) -> SamplingParams:
    path = "start.sampling."
    _check_range(raw.temperature, 0, 100, path + "temperature")
    _check_range(raw.top_k, 0, 2**31 - 1, path + "top_k")
    top_p = raw.top_p if raw.HasField("top_p") else 1.0
    _check(0 < top_p <= 1, path + "top_p", top_p, "must be over 0 and at most 1")
    _check_range(raw.min_p, 0, 1, path + "min_p")
    repetition = raw.repetition_penalty if raw.HasField("repetition_penalty") else 1.0
    _check_range(repetition, *REPETITION_PENALTIES, path + "repetition_penalty")
    _check_range(raw.presence_penalty, -2, 2, path + "presence_penalty")
    _check_range(raw.frequency_penalty, -2, 2, path + "frequency_penalty")
    _check_range(raw.top_logprobs, 0, MAX_TOP_LOGPROBS, path + "top_logprobs")
    num_biases = len(raw.logit_bias)
    _check(
        num_biases <= MAX_LOGIT_BIAS,
        path + "logit_bias",
        f"{num_biases} tokens",
        f"at most {MAX_LOGIT_BIAS} tokens",
    )
    check_token_ids(raw.logit_bias, vocab_size, path + "logit_bias")
    for bias in raw.logit_bias.values():
        _check_range(bias, -100, 100, path + "logit_bias")
    wants_logprobs = raw.logprobs or raw.top_logprobs > 0 or raw.prompt_logprobs
    return SamplingParams(
        temperature=raw.temperature,
        top_k=raw.top_k,
        top_p=top_p,
        min_p=raw.min_p,
        repetition_penalty=repetition,
        presence_penalty=raw.presence_penalty,
        frequency_penalty=raw.frequency_penalty,
        logit_bias=tuple(sorted(raw.logit_bias.items())),
        seed=raw.seed if raw.HasField("seed") else secrets.randbits(64),
        num_logprobs=raw.top_logprobs if wants_logprobs else None,
        prompt_logprobs=raw.prompt_logprobs,
    )


def _parse_stop_strings(strings: Iterable[str]) -> tuple[str, ...]:
    found = tuple(strings)
    path = "start.stop.strings"
    _check(len(found) <= MAX_STOP_STRINGS, path, len(found), f"at most {MAX_STOP_STRINGS}")
    for string in found:
        size = len(string.encode())
        _check(0 < size <= MAX_STOP_STRING_BYTES, path, f"{size} bytes", "must have 1 to 256 bytes")
    return found


def _check_range(value: float, least: float, most: float, path: str) -> None:
    # Written so that NaN fails.
    _check(least <= value <= most, path, value, f"must be from {least} to {most}")


def _check(is_valid: bool, path: str, found: object, rule: str) -> None:
    if not is_valid:
        # A client's 1.1 is 1.100000023841858 in a field of 32 bits.
        shown = f"{found:.7g}" if isinstance(found, float) else found
        raise InvalidField(field=path, problem=f"{rule}, found {shown}")
