"""The tensors of a folder's safetensors: one file, or shards and their index.

Tensors are views of the mapped files: reading a model costs page cache, not anonymous memory. What
a tensor is for is not known here.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from shared.errors import InvalidModel, ModelNotFound

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "I8": torch.int8, "U8": torch.uint8,
    "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Shape and dtype of a tensor as the file holds it; `dtype_name` in safetensors' words."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    dtype_name: str

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor in the file."""
        size = self.dtype.itemsize
        for dim in self.shape:
            size *= dim
        return size


class SafetensorsFiles:
    """The tensors, by name. Files stay open and mapped for the object's life.

    Attributes:
        tensors: every tensor of every file.
        paths: the files that hold the weights, and the index where there is one.
    """

    def __init__(self, folder: Path) -> None:
        self.tensors: dict[str, StoredTensor] = {}
        self._shards: dict[str, Any] = {}
        self._shard_of: dict[str, str] = {}
        self.paths = self._open_shards(folder)

    def read(self, name: str) -> torch.Tensor:
        """The tensor called `name`, as the file holds it."""
        tensor: torch.Tensor = self._shards[self._shard_of[name]].get_tensor(name)
        return tensor

    def _open_shards(self, folder: Path) -> list[Path]:
        index_path = folder / INDEX_NAME
        if not index_path.is_file():
            if not (folder / SINGLE_NAME).is_file():
                problem = f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}"
                raise ModelNotFound(model_uri=folder, problem=problem)
            self._open_shard(folder / SINGLE_NAME)
            return [folder / SINGLE_NAME]
        weight_map = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InvalidModel(problem=f"{INDEX_NAME} has no weight_map")
        for file_name in weight_map.values():
            if not isinstance(file_name, str) or Path(file_name).name != file_name:
                raise InvalidModel(problem=f"{INDEX_NAME} names {file_name!r} outside the folder")
        file_names = sorted(set(weight_map.values()))
        for file_name in file_names:
            self._open_shard(folder / file_name)
        for name, file_name in weight_map.items():
            if self._shard_of.get(name) != file_name:
                raise InvalidModel(
                    problem=f"{INDEX_NAME} places {name} in {file_name}, which does not hold it"
                )
        return [index_path, *(folder / n for n in file_names)]

    def _open_shard(self, path: Path) -> None:
        if not path.is_file():
            raise InvalidModel(problem=f"shard {path.name} is missing")
        try:
            shard: Any = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise InvalidModel(problem=f"{path.name} is truncated or corrupt ({error})") from error
        self._shards[path.name] = shard
        for name in shard.keys():  # noqa: SIM118 - a safetensors handle is no mapping
            if name in self._shard_of:
                problem = f"{name} is in both {self._shard_of[name]} and {path.name}"
                raise InvalidModel(problem=problem)
            view = shard.get_slice(name)
            dtype = _DTYPES.get(view.get_dtype())
            if dtype is None:
                known = ", ".join(_DTYPES)
                raise InvalidModel(problem=f"{name} has dtype {view.get_dtype()}; known: {known}")
            self._shard_of[name] = path.name
            self.tensors[name] = StoredTensor(tuple(view.get_shape()), dtype, view.get_dtype())


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file.

    Raises:
        InvalidModel: it is missing, no JSON, or no object.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise InvalidModel(problem=f"{path.name} is missing in {path.parent}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidModel(problem=f"{path.name} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise InvalidModel(problem=f"{path.name} holds no JSON object")
    return value
