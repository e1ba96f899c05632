"""A Hugging Face folder whose weights are quantized already, as the checkpoint that it was made of.

Tensors have the names and shapes that they have unquantized. `read` dequantizes, `read_packed`
gives the checkpoint's own values in a layout of ours. A format is a file beside this one and a row
in FORMATS.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from compiler_service.checkpoints import awq, compressed_tensors, gptq
from compiler_service.checkpoints.checkpoint import (
    Checkpoint,
    Quantized,
    TensorInfo,
    float_format_of,
)
from compiler_service.checkpoints.quantized_linear import QuantizedLinear, Read, Tensors
from compiler_service.checkpoints.safetensors_files import SafetensorsFiles, read_json
from compiler_service.checkpoints.safetensors_folder import (
    SafetensorsFolder,
    commonest_dtype,
    float_tensor,
    side_files,
)
from compiler_service.models import parameter_shapes
from shared.errors import InvalidModel, UnsupportedModel

_FindLinears = Callable[[Mapping[str, Any], Tensors, Read], dict[str, QuantizedLinear]]

FORMATS: dict[str, _FindLinears] = {
    "compressed-tensors": compressed_tensors.find_linears,
    "awq": lambda settings, tensors, read: awq.find_linears(settings, tensors),
    "gptq": gptq.find_linears,
}

# Where the tools kept their settings before config.json had a place for them.
SETTINGS_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


def open_folder(folder: Path, name: str | None = None) -> Checkpoint:
    """The checkpoint in a Hugging Face folder, quantized or not.

    Raises:
        ModelNotFound, InvalidModel, UnsupportedModel: it cannot be used.
    """
    config = read_json(folder / "config.json")
    settings = config.pop("quantization_config", None) or config.pop("compression_config", None)
    if settings is not None:
        if not isinstance(settings, dict):
            raise InvalidModel(problem="config.json's quantization_config is no object")
        return QuantizedFolder(folder, config, settings, (), name)
    for file_name, method in SETTINGS_FILES.items():
        if (folder / file_name).is_file():
            settings = {**read_json(folder / file_name), "quant_method": method}
            return QuantizedFolder(folder, config, settings, (file_name,), name)
    return SafetensorsFolder(folder, config, name)


class QuantizedFolder:
    """The checkpoint in a folder whose weights `settings` describe.

    Args:
        config: config.json without its quantization.
        settings_files: files that `settings` came from, if not config.json.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        settings: Mapping[str, Any],
        settings_files: tuple[str, ...],
        name: str | None = None,
    ) -> None:
        self.name = name or folder.resolve().name
        self.config = config
        self.files = side_files(folder)
        find_linears = _format_of(settings)
        self._weights = SafetensorsFiles(folder)
        self._linears = find_linears(settings, self._weights.tensors, self._weights.read)
        if not self._linears:
            method = settings.get("quant_method")
            raise InvalidModel(problem=f"it says that {method} quantized it and no tensor is")
        self.tensors = self._logical_tensors()
        self.digest_inputs: dict[str, Path | bytes] = {
            path.name: path
            for path in (
                folder / "config.json",
                *(folder / n for n in (*settings_files, *self.files)),
                *self._weights.paths,
            )
        }
        self.float_format = float_format_of(commonest_dtype(self.tensors))

    def read(self, name: str) -> torch.Tensor:
        """The tensor called `name`: floats as the file holds them, quantized ones as fp32."""
        linear = self._linears.get(name)
        return self._weights.read(name) if linear is None else linear.read(self._weights.read)

    def read_packed(self, name: str) -> dict[str, torch.Tensor]:
        """The tensor called `name` by the roles of its own layout."""
        pack = self._linears[name].pack
        assert pack is not None, f"{name} fits no layout"
        return pack(self._weights.read)

    def _logical_tensors(self) -> dict[str, TensorInfo]:
        stored = self._weights.tensors
        parts = {part for linear in self._linears.values() for part in linear.parts.values()}
        left_out = parts | self._empty_biases() | {
            name for name in stored if name.endswith(compressed_tensors.LEFT_OUT)
        }  # fmt: skip
        tensors = {n: float_tensor(n, t) for n, t in stored.items() if n not in left_out}
        for name, linear in self._linears.items():
            if name in tensors:
                raise InvalidModel(problem=f"{name} is there both quantized and as floats")
            num_bytes = sum(stored[part].num_bytes for part in linear.parts.values())
            quantized = Quantized(linear.format, num_bytes, linear.layout, linear.group_size)
            tensors[name] = TensorInfo(linear.shape, torch.float32, quantized)
        return tensors

    def _empty_biases(self) -> set[str]:
        """Biases of zeros that tools add to every linear, where the model has none."""
        wanted = parameter_shapes(self.config)
        candidates = {f"{name.removesuffix('weight')}bias" for name in self._linears}
        return {
            name
            for name in candidates & set(self._weights.tensors) - set(wanted)
            if not bool(self._weights.read(name).any())
        }


def _format_of(settings: Mapping[str, Any]) -> _FindLinears:
    method = settings.get("quant_method")
    if method is None and "config_groups" in settings:
        method = "compressed-tensors"
    if not isinstance(method, str) or method not in FORMATS:
        known = f"quantized by {', '.join(FORMATS)}, or not at all"
        sizes = settings.get("weight_block_size")
        blocks = f" in blocks of {' x '.join(map(str, sizes))}" if isinstance(sizes, list) else ""
        raise UnsupportedModel(architecture=f"quantized by {method}{blocks}", known=known)
    return FORMATS[method]
