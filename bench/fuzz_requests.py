"""Requests that are nearly right, for the fuzzing of a gateway's other protocols: KServe's and OpenAI's.

What a message has by chance alone, nobody looks at: an unknown name is refused at once. So names and
types are drawn from what the gateway knows, and values from what it does not expect.
"""

import json
import random
import string
import struct
from typing import Any

from millrace.kserve.v2 import inference_pb2 as kserve

from runtime_service.gateway.http.openai_requests import ChatRequest, CompletionRequest
from runtime_service.gateway.kserve.requests import INPUTS, OUTPUTS
from runtime_service.gateway.kserve.tensors import _TYPES

MODELS = ("chat", "tiny", "", "other")
# Numbers that break what was not thought of.
EXTREME = (0, 1, -1, 2, 63, 64, 65, 2**31 - 1, -(2**31), 2**31, 2**63 - 1, 2**64 - 1)
FLOATS = (0.0, 1.0, -1.0, 0.5, 1e-9, 1e30, -1e30, float("nan"), float("inf"), -float("inf"))
# Numbers that most fields take.
_USUAL = (1, 1, 2, 0.5, 0)
_DATATYPES = ("BYTES", *_TYPES, "FP16", "")
_PARAMETERS = (*INPUTS, "timeout", "priority", "n", "logprobs", "logit_bias", "other",
               "triton_enable_empty_final_response")  # fmt: skip
_ROLES = ("user", "system", "developer", "assistant", "tool", "nobody")


def text(draw: random.Random) -> str:
    """A string of some kind."""
    alphabet = draw.choice((string.ascii_lowercase, "aä🙂\0\n", string.printable, "/.:"))
    return "".join(draw.choices(alphabet, k=draw.choice((0, 1, 5, 70, 300))))


def infer_request(draw: random.Random) -> kserve.ModelInferRequest:
    """A request of KServe's, wrong in a place or two at most half of the time."""
    request = kserve.ModelInferRequest(model_name=_often(draw, "chat", draw.choice(MODELS)))
    request.id = _often(draw, "", text(draw))
    request.model_version = _often(draw, "", draw.choice(("1", "2", text(draw))))
    is_raw = draw.random() < 0.3
    names = ["text_input", *draw.sample(list(INPUTS), draw.choice((0, 0, 1, 2, 5)))]
    for name in names:
        datatype = _often(draw, INPUTS[name], draw.choice(_DATATYPES))
        tensor = request.inputs.add(name=name, datatype=datatype)
        shape = _often(draw, [1], [draw.choice((-1, 0, 1, 2, 2**62))] * 2)
        tensor.shape.extend(shape)
        content = _content(draw, tensor, name)
        if is_raw:
            request.raw_input_contents.append(content)
    for _ in range(draw.choice((0, 0, 1, 3))):
        _set_parameter(draw, request.parameters[draw.choice(_PARAMETERS)])
    for name in draw.sample([*OUTPUTS, "other"], draw.choice((0, 0, 1, 3))):
        request.outputs.add(name=name)
    return request


def _content(draw: random.Random, tensor: Any, name: str) -> bytes:
    """Fills the tensor with one value, and gives the same as raw bytes."""
    contents = tensor.contents
    if tensor.datatype == "BYTES":
        words = text(draw)
        if name == "sampling_parameters":
            words = json.dumps(fields_of(draw, CompletionRequest, 3))
        value = _often(draw, (words or "a").encode(), draw.randbytes(9))
        contents.bytes_contents.append(value)
        return _often(draw, len(value).to_bytes(4, "little") + value, draw.randbytes(7))
    if tensor.datatype in ("FP32", "FP64"):
        number = _often(draw, draw.choice(_USUAL), draw.choice(FLOATS))
        contents.fp32_contents.append(number)
        contents.fp64_contents.append(number)
        return struct.pack("<f" if tensor.datatype == "FP32" else "<d", number)
    else:
        number = int(_often(draw, draw.choice(_USUAL), draw.choice(EXTREME)))
        contents.bool_contents.append(bool(number % 2))
        contents.int_contents.append(min(max(number, -(2**31)), 2**31 - 1))
        contents.int64_contents.append(min(number, 2**63 - 1))
        contents.uint_contents.append(abs(number) % 2**32)
        contents.uint64_contents.append(abs(number))
    return draw.randbytes(draw.choice((1, 4, 8, 3)))


def _set_parameter(draw: random.Random, parameter: kserve.InferParameter) -> None:
    kind = draw.randrange(6)
    if kind == 0:
        parameter.bool_param = draw.random() < 0.5
    elif kind == 1:
        parameter.int64_param = min(draw.choice((1, *EXTREME)), 2**63 - 1)
    elif kind == 2:
        parameter.string_param = draw.choice(("1", "true", "-5", "0.5", text(draw)))
    elif kind == 3:
        parameter.double_param = draw.choice(FLOATS)
    elif kind == 4:
        parameter.uint64_param = abs(draw.choice(EXTREME))


def body(draw: random.Random, kind: type[ChatRequest] | type[CompletionRequest]) -> bytes:
    """The body of a request of OpenAI's: right but for some fields, or cut and flipped."""
    fields = fields_of(draw, kind, draw.choice((0, 1, 2, 4)))
    fields["model"] = _often(draw, "chat", _value(draw, 0))
    if kind is ChatRequest:
        fields["messages"] = _often(draw, _messages(draw), _value(draw, 0))
    else:
        prompts = (text(draw) or "a", [1, 2, 3], ["a", "b"], [[1], [2, 3]], [[]], [1, "a"])
        fields["prompt"] = _often(draw, draw.choice(prompts), _value(draw, 0))
    fields.setdefault("max_tokens", draw.choice((1, 2, 8)))
    if draw.random() < 0.4:
        fields["stream"] = True
    encoded = json.dumps(fields).encode()
    return encoded if draw.random() < 0.8 else mutated(encoded, draw)


def fields_of(draw: random.Random, kind: Any, count: int) -> dict[str, Any]:
    """So many fields that `kind` has, or that it knows and refuses, with values of any type."""
    names = [*kind.__struct_fields__, "tools", "response_format", "echo", "best_of", "other"]
    return {
        name: _often(draw, draw.choice(_USUAL), _value(draw, 0))
        for name in draw.sample(names, count)
    }


def _messages(draw: random.Random) -> list[Any]:
    messages: list[Any] = []
    for _ in range(draw.choice((0, 1, 1, 2, 3))):
        parts = [{"type": draw.choice(("text", "image_url")), "text": text(draw)}]
        content = _often(draw, text(draw), draw.choice((parts, None, _value(draw, 0))))
        messages.append({"role": _often(draw, "user", draw.choice(_ROLES)), "content": content})
        if draw.random() < 0.1:
            messages[-1][draw.choice(("name", "tool_calls", "other"))] = _value(draw, 0)
    return messages


def _value(draw: random.Random, depth: int) -> Any:
    """Any JSON, and what Python's writer takes for JSON."""
    kind = draw.randrange(9 if depth < 3 else 6)
    if kind < 3:
        return draw.choice((*EXTREME, 10**30, draw.randrange(300)))
    if kind == 3:
        return draw.choice((*FLOATS, 1e308))
    if kind == 4:
        return draw.choice((None, True, False))
    if kind == 5:
        return draw.choice((text(draw), "\ud800", "1", "-1"))
    several = [_value(draw, depth + 1) for _ in range(draw.randrange(4))]
    return several if kind < 8 else {draw.choice(("1", "5", text(draw))): v for v in several}


def mutated(data: bytes, draw: random.Random) -> bytes:
    """`data` with some of it flipped, cut off, or said twice."""
    changed = bytearray(data)
    for _ in range(draw.randrange(1, 5)):
        if changed:
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    if draw.random() < 0.3:
        del changed[draw.randrange(len(changed) + 1) :]
    return bytes(changed * 2 if draw.random() < 0.2 else changed)


def _often(draw: random.Random, right: Any, wrong: Any) -> Any:
    return right if draw.random() < 0.9 else wrong
