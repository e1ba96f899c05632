"""A Hugging Face folder: config.json, safetensors (one file, or shards and their index), tokenizer.

Tensors are views of the mapped files: reading a model costs page cache, not anonymous memory.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from compiler_service.checkpoints.checkpoint import FILE_NAMES, TensorInfo, float_format_of
from shared.errors import InvalidModel, ModelNotFound

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class SafetensorsFolder:
    """The checkpoint in a folder. Files stay open and mapped for the object's life."""

    def __init__(self, folder: Path, name: str | None = None) -> None:
        self.name = name or folder.resolve().name
        self.config = read_json(folder / "config.json")
        self.files = {n: (folder / n).read_bytes() for n in FILE_NAMES if (folder / n).is_file()}
        self._shards: dict[str, Any] = {}
        self._shard_of: dict[str, str] = {}
        self.tensors: dict[str, TensorInfo] = {}
        weight_files = self._open_shards(folder)
        side_files = [folder / "config.json", *(folder / n for n in self.files)]
        self.digest_inputs: dict[str, Path | bytes] = {
            path.name: path for path in (*side_files, *weight_files)
        }
        self.float_format = float_format_of(_commonest_dtype(self.tensors))

    def read(self, name: str) -> torch.Tensor:
        """The tensor called `name`, as the file holds it."""
        tensor: torch.Tensor = self._shards[self._shard_of[name]].get_tensor(name)
        return tensor

    def _open_shards(self, folder: Path) -> list[Path]:
        """Opens every shard and lists its tensors; the files that hold the weights."""
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
        for file_name in sorted(set(weight_map.values())):
            if Path(file_name).name != file_name:
                raise InvalidModel(problem=f"{INDEX_NAME} names {file_name!r} outside the folder")
            self._open_shard(folder / file_name)
        for name, file_name in weight_map.items():
            if self._shard_of.get(name) != file_name:
                raise InvalidModel(
                    problem=f"{INDEX_NAME} places {name} in {file_name}, which does not hold it"
                )
        return [index_path, *(folder / n for n in sorted(set(weight_map.values())))]

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
                raise InvalidModel(
                    problem=f"{name} has dtype {view.get_dtype()}; weights are F32, F16 or BF16"
                )
            self._shard_of[name] = path.name
            self.tensors[name] = TensorInfo(tuple(view.get_shape()), dtype)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file.

    Raises:
        InvalidModel: it is missing, no JSON, or no object.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise InvalidModel(problem=f"{path.name} is missing in {path.parent}") from error
    except ValueError as error:
        raise InvalidModel(problem=f"{path.name} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise InvalidModel(problem=f"{path.name} holds no JSON object")
    return value


def _commonest_dtype(tensors: dict[str, TensorInfo]) -> torch.dtype:
    num_bytes: dict[torch.dtype, int] = {}
    for info in tensors.values():
        num_bytes[info.dtype] = num_bytes.get(info.dtype, 0) + info.num_bytes
    return max(num_bytes, key=lambda dtype: num_bytes[dtype], default=torch.bfloat16)
