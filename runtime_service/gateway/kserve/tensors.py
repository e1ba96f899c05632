"""Tensors of the protocol, which here hold a few values each: to Python's, and back.

Source: Open Inference Protocol, "Tensor Data"; Triton's binary tensor data extension for BYTES.
"""

import math
import struct
from collections.abc import Sequence

from millrace.kserve.v2 import inference_pb2 as pb

from shared.errors import InvalidField

Value = bool | int | float | str

# Of each type, the letter that `struct` knows it by, and the list that holds it where it is not raw.
_TYPES = {
    "BOOL": ("?", "bool_contents"),
    "INT8": ("b", "int_contents"),
    "INT16": ("h", "int_contents"),
    "INT32": ("i", "int_contents"),
    "INT64": ("q", "int64_contents"),
    "UINT8": ("B", "uint_contents"),
    "UINT16": ("H", "uint_contents"),
    "UINT32": ("I", "uint_contents"),
    "UINT64": ("Q", "uint64_contents"),
    "FP32": ("f", "fp32_contents"),
    "FP64": ("d", "fp64_contents"),
}
_BYTES = "BYTES"
_LENGTH = struct.Struct("<I")


def inputs_of(request: pb.ModelInferRequest) -> dict[str, list[Value]]:
    """The values of each input, by its name.

    Raises:
        InvalidField: a content is not what its type and shape say, or an input comes twice.
    """
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        problem = f"must be one for each of the {len(request.inputs)} inputs, found {len(raw)}"
        raise InvalidField(field="raw_input_contents", problem=problem)
    found: dict[str, list[Value]] = {}
    for place, tensor in enumerate(request.inputs):
        if tensor.name in found:
            raise InvalidField(field=tensor.name, problem="is given twice")
        if tensor.datatype == _BYTES:
            packed = (
                _unpack_bytes(raw[place], tensor.name) if raw else tensor.contents.bytes_contents
            )
            values: list[Value] = [_text(one, tensor.name) for one in packed]
        elif tensor.datatype in _TYPES:
            letter, contents = _TYPES[tensor.datatype]
            values = list(
                _unpack(raw[place], letter, tensor.name)
                if raw
                else getattr(tensor.contents, contents)
            )
        else:
            problem = f"has the datatype {tensor.datatype!r}; known: {_BYTES}, {', '.join(_TYPES)}"
            raise InvalidField(field=tensor.name, problem=problem)
        if len(values) != math.prod(tensor.shape):
            problem = f"has {len(values)} elements, and the shape {list(tensor.shape)}"
            raise InvalidField(field=tensor.name, problem=problem)
        found[tensor.name] = values
    return found


def add_output(
    response: pb.ModelInferResponse,
    name: str,
    datatype: str,
    values: Sequence[Value],
    shape: Sequence[int] | None = None,
) -> None:
    """Adds a tensor of `values`, row after row; without a shape it is a vector."""
    response.outputs.add(name=name, datatype=datatype, shape=shape or [len(values)])
    if datatype == _BYTES:
        texts = [str(value).encode() for value in values]
        packed = b"".join([_LENGTH.pack(len(text)) + text for text in texts])
    else:
        packed = struct.pack(f"<{len(values)}{_TYPES[datatype][0]}", *values)
    response.raw_output_contents.append(packed)


def _unpack(content: bytes, letter: str, name: str) -> tuple[Value, ...]:
    size = struct.calcsize(f"<{letter}")
    if len(content) % size:
        problem = f"has {len(content)} bytes, which are no elements of {size}"
        raise InvalidField(field=name, problem=problem)
    return struct.unpack(f"<{len(content) // size}{letter}", content)


def _unpack_bytes(content: bytes, name: str) -> list[bytes]:
    found, at = [], 0
    while at < len(content):
        start = at + _LENGTH.size
        at = start + _LENGTH.unpack_from(content, at)[0] if start <= len(content) else start
        if at > len(content):
            problem = "is cut off: each element needs its length, and that many bytes"
            raise InvalidField(field=name, problem=problem)
        found.append(content[start:at])
    return found


def _text(content: bytes, name: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise InvalidField(field=name, problem="must be UTF-8") from None
