"""A Hugging Face folder of float weights: config.json, safetensors, tokenizer."""

from pathlib import Path
from typing import Any

import torch

from compiler_service.checkpoints.checkpoint import FILE_NAMES, TensorInfo, float_format_of
from compiler_service.checkpoints.safetensors_files import (
    FLOAT_DTYPES,
    SafetensorsFiles,
    StoredTensor,
)
from shared.errors import InvalidModel


class SafetensorsFolder:
    """The checkpoint in a folder whose config.json holds `config`."""

    def __init__(self, folder: Path, config: dict[str, Any], name: str | None = None) -> None:
        self.name = name or folder.resolve().name
        self.config = config
        self.files = side_files(folder)
        self._weights = SafetensorsFiles(folder)
        self.tensors = {n: float_tensor(n, t) for n, t in self._weights.tensors.items()}
        self.digest_inputs: dict[str, Path | bytes] = {
            path.name: path
            for path in (
                folder / "config.json", *(folder / n for n in self.files), *self._weights.paths
            )
        }  # fmt: skip
        self.float_format = float_format_of(commonest_dtype(self.tensors))

    def read(self, name: str) -> torch.Tensor:
        """The tensor called `name`, as the file holds it."""
        return self._weights.read(name)

    def read_packed(self, name: str) -> dict[str, torch.Tensor]:
        """Never asked for: no tensor here is quantized."""
        raise AssertionError(f"{name} is not quantized")


def side_files(folder: Path) -> dict[str, bytes]:
    """Those of FILE_NAMES that the folder holds."""
    return {n: (folder / n).read_bytes() for n in FILE_NAMES if (folder / n).is_file()}


def float_tensor(name: str, stored: StoredTensor) -> TensorInfo:
    """What `stored` is to a checkpoint.

    Raises:
        InvalidModel: it does not hold floats.
    """
    if stored.dtype not in FLOAT_DTYPES:
        raise InvalidModel(
            problem=f"{name} has dtype {stored.dtype_name}; weights are F32, F16 or BF16, "
            "unless config.json has a quantization_config"
        )
    return TensorInfo(stored.shape, stored.dtype)


def commonest_dtype(tensors: dict[str, TensorInfo]) -> torch.dtype:
    """The dtype of most bytes of float weights."""
    num_bytes: dict[torch.dtype, int] = {}
    for info in tensors.values():
        if info.quantized is None:
            num_bytes[info.dtype] = num_bytes.get(info.dtype, 0) + info.num_bytes
    return max(num_bytes, key=lambda dtype: num_bytes[dtype], default=torch.bfloat16)
