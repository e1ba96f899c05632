"""What every source of models looks like to the compiler, whatever its files look like.

A checkpoint speaks Hugging Face: `config` has the fields of config.json, tensors have the names
that transformers gives them. Families, schemes and the builder know nothing else of files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

# What a checkpoint may carry beside weights, and what an engine keeps of it.
FILE_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
)


@dataclass(frozen=True, slots=True)
class Quantized:
    """How a checkpoint itself stores a tensor that it has quantized.

    Args:
        format: in its maker's words, such as `Q4_1` or `GPTQ 4-bit`.
        num_bytes: of all that the file holds for it.
        layout: the one of `kernels.linear.layouts.LAYOUTS` that holds exactly its values; "" where
            none does.
        group_size: of that layout.
    """

    format: str
    num_bytes: int
    layout: str = ""
    group_size: int = 0


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor's logical shape, the dtype that `Checkpoint.read` gives it in, and how it is stored.

    Args:
        quantized: None where it is stored as floats.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    quantized: Quantized | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor in the checkpoint."""
        if self.quantized is not None:
            return self.quantized.num_bytes
        size = self.dtype.itemsize
        for dim in self.shape:
            size *= dim
        return size


class Checkpoint(Protocol):
    """A model that can be read tensor by tensor.

    Attributes:
        name: what people call it; the engine's default model name.
        config: config.json's fields.
        float_format: the scheme that keeps float weights as they are: `bf16` or `fp32`.
        tensors: every tensor, under its Hugging Face name.
        files: those of FILE_NAMES that there are, as bytes.
        digest_inputs: everything that the model's digest covers: title to file or bytes.
    """

    @property
    def name(self) -> str: ...

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def float_format(self) -> str: ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    @property
    def files(self) -> Mapping[str, bytes]: ...

    @property
    def digest_inputs(self) -> Mapping[str, Path | bytes]: ...

    def read(self, name: str) -> torch.Tensor:
        """The tensor called `name`; backed by the file where that needs no conversion."""
        ...

    def read_packed(self, name: str) -> dict[str, torch.Tensor]:
        """The tensor called `name`, which is quantized, by the roles of its own layout.

        Nothing is rounded: unpacked, it is the tensor that `read` gives.
        """
        ...


def float_format_of(dtype: torch.dtype) -> str:
    """The scheme that keeps weights of `dtype`: fp16 becomes bf16, which CPUs and GPUs share."""
    return "fp32" if dtype == torch.float32 else "bf16"
