"""The head of a GGUF file: its metadata and where its tensors lie.

Read in one pass with every length checked against the file, so that a corrupt file is one clear
error and a large vocabulary costs milliseconds. What tensor bytes mean is the `gguf` library's.

Layout: magic, version, counts; then key, type, value of each metadata entry; then name, dims
(innermost first), type and offset of each tensor; then, aligned, the tensors.
Source: ggml-org/ggml, docs/gguf.md.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from shared.errors import InvalidModel

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies. `shape` is outermost first, as torch has it."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Metadata by key, tensors by GGUF name; offsets count from the file's start."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf_header(path: Path) -> GgufHeader:
    """The head of the file at `path`.

    Raises:
        InvalidModel: it is no GGUF file, cut short, or contradicts itself.
    """
    size = path.stat().st_size
    if size < 24:
        raise InvalidModel(problem=f"{path.name} is no GGUF file: it has {size} bytes")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reader = _Reader(data, path.name)
        if data[:4] != _MAGIC:
            raise InvalidModel(problem=f"{path.name} is no GGUF file: it begins with {data[:4]!r}")
        reader.offset = 4
        version = reader.scalar("I")
        if version not in _VERSIONS:
            problem = f"{path.name} has GGUF version {version}; versions 2 and 3 can be read"
            raise InvalidModel(problem=problem)
        num_tensors, num_entries = reader.scalar("Q"), reader.scalar("Q")
        metadata = {}
        for _ in range(num_entries):
            key = reader.string()
            if key in metadata:
                raise reader.corrupt(f"{key} occurs twice")
            metadata[key] = reader.value(reader.scalar("I"))
        places = [reader.tensor() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if isinstance(alignment, bool) or not isinstance(alignment, int) or alignment < 1:
            raise reader.corrupt(f"general.alignment is {alignment!r}")
        start = -(-reader.offset // alignment) * alignment
    return GgufHeader(metadata, _placed(places, start, size, reader))


def _placed(
    places: list[tuple[str, tuple[int, ...], int, int]], start: int, size: int, reader: "_Reader"
) -> dict[str, GgufTensor]:
    tensors = {}
    for name, shape, kind_id, offset in places:
        try:
            kind = GGMLQuantizationType(kind_id)
        except ValueError as error:
            raise reader.corrupt(f"{name} has the unknown tensor type {kind_id}") from error
        block_values, block_bytes = GGML_QUANT_SIZES[kind]
        if name in tensors or not shape or min(shape) < 1 or shape[-1] % block_values:
            raise reader.corrupt(f"{name} occurs twice or has the impossible shape {shape}")
        num_bytes = math.prod(shape) // block_values * block_bytes
        if start + offset + num_bytes > size:
            raise InvalidModel(
                problem=f"{reader.file_name} is truncated: {name} ends at byte "
                f"{start + offset + num_bytes} and the file has {size}"
            )
        tensors[name] = GgufTensor(shape, kind, start + offset, num_bytes)
    return tensors


class _Reader:
    """A cursor over the mapped file that refuses to leave it."""

    def __init__(self, data: mmap.mmap, file_name: str) -> None:
        self.data, self.file_name, self.offset = data, file_name, 0

    def corrupt(self, what: str) -> InvalidModel:
        return InvalidModel(problem=f"{self.file_name} is corrupt: {what}")

    def take(self, num_bytes: int) -> bytes:
        end = self.offset + num_bytes
        if end > len(self.data):
            raise self.corrupt(f"an entry at byte {self.offset} ends beyond the file")
        taken = self.data[self.offset : end]
        self.offset = end
        return taken

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        raw = self.take(self.scalar("Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.corrupt(f"the text before byte {self.offset} is not UTF-8") from error

    def value(self, type_id: int) -> Any:
        if type_id == _STRING:
            return self.string()
        if type_id in _SCALARS:
            return self.scalar(_SCALARS[type_id])
        if type_id != _ARRAY:
            raise self.corrupt(f"value type {type_id} before byte {self.offset} does not exist")
        item_type, count = self.scalar("I"), self.scalar("Q")
        if item_type == _ARRAY:
            raise self.corrupt(f"an array of arrays before byte {self.offset}, which nothing uses")
        if count > len(self.data):
            raise self.corrupt(f"an array before byte {self.offset} claims {count} values")
        if item_type in _SCALARS:
            code = f"<{count}{_SCALARS[item_type]}"
            return list(struct.unpack(code, self.take(struct.calcsize(code))))
        return [self.value(item_type) for _ in range(count)]

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string()
        num_dims = self.scalar("I")
        if num_dims > 8:
            raise self.corrupt(f"{name} claims {num_dims} dims")
        dims = struct.unpack(f"<{num_dims}Q", self.take(8 * num_dims))
        return name, tuple(reversed(dims)), self.scalar("I"), self.scalar("Q")
