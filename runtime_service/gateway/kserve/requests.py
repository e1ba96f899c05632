"""What KServe's clients ask for, as starts of generations.

How to generate may be said in three ways, of which the later wins: parameters of the request, the
input `sampling_parameters` (JSON, as Triton's vLLM backend takes it), and inputs of their own (as
its TensorRT-LLM backend takes them).
Sources: triton-inference-server/vllm_backend, README.md; tensorrtllm_backend, docs/model_config.md.
"""

from dataclasses import dataclass
from typing import Any

import msgspec
from millrace.kserve.v2 import inference_pb2 as kserve
from millrace.runtime.v1 import runtime_pb2 as pb

from runtime_service.gateway.kserve.tensors import Value, inputs_of
from runtime_service.gateway.sampling_fields import (
    Sampling,
    checked,
    misfit,
    no_json,
    set_sampling,
)
from shared.errors import InvalidField

VERSION = "1"
MAX_ID_CHARS = 256
# As vLLM does where it is not told.
DEFAULT_TOKENS = 16

# What it takes, and the type of each.
INPUTS: dict[str, str] = {
    "text_input": "BYTES",
    "stream": "BOOL",
    "exclude_input_in_output": "BOOL",
    "return_finish_reason": "BOOL",
    "return_cumulative_logprob": "BOOL",
    "return_logprobs": "BOOL",
    "return_log_probs": "BOOL",
    "return_num_input_tokens": "BOOL",
    "return_num_output_tokens": "BOOL",
    "sampling_parameters": "BYTES",
    "max_tokens": "INT32",
    "temperature": "FP32",
    "top_p": "FP32",
    "top_k": "INT32",
    "min_p": "FP32",
    "repetition_penalty": "FP32",
    "presence_penalty": "FP32",
    "frequency_penalty": "FP32",
    "seed": "UINT64",
    "random_seed": "UINT64",
    "min_tokens": "INT32",
    "min_length": "INT32",
    "stop": "BYTES",
    "stop_words": "BYTES",
    "bad_words": "BYTES",
    "end_id": "INT32",
    "pad_id": "INT32",
    "beam_width": "INT32",
}
# What it gives: the type, and the input that asks for it.
OUTPUTS = {
    "text_output": ("BYTES", ""),
    "finish_reason": ("BYTES", "return_finish_reason"),
    "cumulative_logprob": ("FP32", "return_cumulative_logprob"),
    "logprobs": ("BYTES", "return_logprobs"),
    "cum_log_probs": ("FP32", "return_log_probs"),
    "output_log_probs": ("FP32", "return_log_probs"),
    "num_input_tokens": ("UINT32", "return_num_input_tokens"),
    "num_output_tokens": ("UINT32", "return_num_output_tokens"),
}
_LISTS = ("stop", "stop_words", "bad_words")
_FLAGS = ("stream", "exclude_input_in_output", *{asks: 0 for _, asks in OUTPUTS.values() if asks})
_LOGPROBS = ("cumulative_logprob", "logprobs", "cum_log_probs", "output_log_probs")
_OTHER_NAMES = {"random_seed": "seed", "min_length": "min_tokens", "stop_words": "stop"}
_TIMEOUT, _MAX_TIMEOUT_US = "timeout", 10**12
# Asks that the last answer be told, which it is anyway.
_EMPTY_FINAL = "triton_enable_empty_final_response"


@dataclass(frozen=True, slots=True)
class Asked:
    """One request.

    Args:
        start: without its request id.
        prefix: of the text that is given: the prompt, where it is wanted.
        outputs: names of those to give.
    """

    id: str
    model: str
    start: pb.StartGeneration
    is_stream: bool
    prefix: str
    outputs: tuple[str, ...]


def parse(request: kserve.ModelInferRequest) -> Asked:
    """What `request` asks for.

    Raises:
        InvalidField: an input or a parameter is unknown, missing or none of its kind.
    """
    check_version(request.model_version)
    # Regions of shared memory, and classes: what is passed over would be waited for.
    parts = [(part.name, part.parameters) for part in request.inputs]
    parts += [(part.name, part.parameters) for part in request.outputs]
    for name, said in parts:
        for parameter in said:
            problem = f"is not supported with the parameter {parameter!r}"
            raise InvalidField(field=name, problem=problem)
    if len(request.id) > MAX_ID_CHARS:
        problem = f"must have at most {MAX_ID_CHARS} characters, found {len(request.id)}"
        raise InvalidField(field="id", problem=problem)
    inputs = inputs_of(request)
    for name in inputs.keys() - INPUTS.keys():
        problem = f"is no input of this model; known: {', '.join(INPUTS)}"
        raise InvalidField(field=name, problem=problem)
    given = {
        name: values if name in _LISTS else _one(name, values) for name, values in inputs.items()
    }
    text = given.pop("text_input", "")
    if not isinstance(text, str) or not text:
        raise InvalidField(field="text_input", problem="must be a text of at least one character")
    parameters = {name: _value_of(name, value) for name, value in request.parameters.items()}
    start = pb.StartGeneration(text=text, model=request.model_name)
    _set_timeout(start, parameters.pop(_TIMEOUT, None))
    parameters.pop(_EMPTY_FINAL, None)
    # Clients of the vLLM backend may have put the flags among the parameters too.
    flags = {name: _flag(name, given, parameters) for name in _FLAGS}
    is_stream = flags["stream"]
    excludes_prompt = flags["exclude_input_in_output"] or is_stream
    outputs = _outputs(request, flags)
    written = _json_object(given.pop("sampling_parameters", "{}"))
    if "priority" in parameters:
        problem = "is not supported: Triton counts from the first on, and sampling_parameters up"
        raise InvalidField(field="priority", problem=problem)
    sampling = _sampling({**parameters, **written, **given})
    set_sampling(start, sampling, sampling.max_tokens or DEFAULT_TOKENS)
    start.sampling.logprobs = any(name in _LOGPROBS for name in outputs)
    if "logprobs" in outputs:
        start.sampling.top_logprobs = checked(sampling.logprobs or 0, "logprobs")
    prefix = "" if excludes_prompt else text
    return Asked(request.id, request.model_name, start, is_stream, prefix, outputs)


def refused(request: kserve.ModelInferRequest) -> Asked:
    """What is left of a request that was refused: its names, as far as they may be long."""
    names = request.id[:MAX_ID_CHARS], request.model_name[:MAX_ID_CHARS]
    return Asked(*names, pb.StartGeneration(), is_stream=True, prefix="", outputs=())


def is_version(version: str) -> bool:
    """Whether it is the version that there is, or none is named."""
    return version in ("", VERSION)


def check_version(version: str) -> None:
    """Raises InvalidField unless it is the version that there is."""
    if not is_version(version):
        problem = f"must be {VERSION} or empty, found {version!r}"
        raise InvalidField(field="model_version", problem=problem)


class _Sampling(Sampling, kw_only=True):
    """With how many of the likeliest tokens the output `logprobs` has."""

    logprobs: int | None = None


def _sampling(fields: dict[str, Any]) -> _Sampling:
    """How to generate; without what clients of the TensorRT-LLM backend say always, for nothing."""
    fields.pop("pad_id", None)
    if (width := fields.pop("beam_width", 1)) != 1:
        raise InvalidField(field="beam_width", problem=f"must be 1, found {width!r}")
    end_id = fields.pop("end_id", None)
    if not (end_id is None or isinstance(end_id, int)):
        raise InvalidField(field="end_id", problem=f"must be a token id, found {end_id!r}")
    if any(word != "" for word in _listed(fields.pop("bad_words", None))):
        problem = "is not supported: words cannot be banned, and tokens can by logit_bias"
        raise InvalidField(field="bad_words", problem=problem)
    fields = {_OTHER_NAMES.get(name, name): value for name, value in fields.items()}
    if isinstance(stop := fields.get("stop"), list):
        fields["stop"] = [string for string in stop if string != ""]
    try:
        # Numbers may be written as text: clients of the vLLM backend do.
        sampling = msgspec.convert(fields, _Sampling, strict=False)
    except msgspec.ValidationError as error:
        raise misfit(error, "sampling_parameters") from None
    if end_id is not None:
        sampling.stop_token_ids = [*(sampling.stop_token_ids or ()), end_id]
    return sampling


def _listed(value: object) -> list[object]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _flag(name: str, given: dict[str, Any], parameters: dict[str, Value]) -> bool:
    """A flag that is an input, or a parameter of any kind."""
    value = given.pop(name, parameters.pop(name, False))
    if value in ("true", "false"):
        return bool(value == "true")
    if isinstance(value, str):
        raise InvalidField(field=name, problem=f"must be true or false, found {value!r}")
    return bool(value)


def _outputs(request: kserve.ModelInferRequest, flags: dict[str, bool]) -> tuple[str, ...]:
    named = [output.name for output in request.outputs]
    for name in named:
        if name not in OUTPUTS:
            problem = f"there is no output {name!r}; known: {', '.join(OUTPUTS)}"
            raise InvalidField(field="outputs", problem=problem)
    asked = [name for name, (_, flag) in OUTPUTS.items() if not flag or flags[flag]]
    return tuple(name for name in OUTPUTS if name in named or (name in asked and not named))


def _set_timeout(start: pb.StartGeneration, timeout: Value | None) -> None:
    if timeout is None:
        return
    if isinstance(timeout, str) or not 1 <= timeout <= _MAX_TIMEOUT_US:
        problem = f"must be from 1 to {_MAX_TIMEOUT_US} microseconds, found {timeout!r}"
        raise InvalidField(field=_TIMEOUT, problem=problem)
    start.timeout.FromMicroseconds(int(timeout))


def _one(name: str, values: list[Value]) -> Value:
    if len(values) != 1:
        raise InvalidField(field=name, problem=f"must have one element, found {len(values)}")
    return values[0]


def _value_of(name: str, parameter: kserve.InferParameter) -> Value:
    kind = parameter.WhichOneof("parameter_choice")
    if kind is None:
        raise InvalidField(field=name, problem="has no value")
    value: Value = getattr(parameter, kind)
    return value


def _json_object(text: object) -> dict[str, Any]:
    try:
        return msgspec.json.decode(str(text), type=dict[str, Any])
    except msgspec.ValidationError as error:
        problem = f"must be a JSON object: {error}"
        raise InvalidField(field="sampling_parameters", problem=problem) from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise no_json(str(text), error, "sampling_parameters") from None
