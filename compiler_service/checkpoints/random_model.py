"""`random:<config.json>?seed=N`: a model of any size that needs no download.

Weights are drawn tensor by tensor from (seed, name), so the model is the same everywhere and never
in memory as a whole. Benchmarks and tests of big builds go through it the real way.
"""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path

import torch

from compiler_service.checkpoints.byte_tokenizer import NUM_TOKENS, byte_tokenizer_files
from compiler_service.checkpoints.checkpoint import FILE_NAMES, TensorInfo
from compiler_service.checkpoints.safetensors_files import read_json
from compiler_service.models import parameter_shapes
from shared.engine import canonical_json
from shared.errors import InvalidModel

# Part of the digest: another way to draw is another model.
_RECIPE = "uniform-bf16-v1"
# Drawn in pieces of this many values, which stay in cache.
_CHUNK_VALUES = 1 << 20


class RandomModel:
    """The random checkpoint of a config.json."""

    float_format = "bf16"

    def __init__(self, config_path: Path, seed: int) -> None:
        self.config = read_json(config_path)
        folder = config_path.resolve().parent
        stem = folder.name if config_path.name == "config.json" else config_path.stem
        self.name = f"{stem}-random{seed}"
        self.files = {n: (folder / n).read_bytes() for n in FILE_NAMES if (folder / n).is_file()}
        if "tokenizer.json" not in self.files:
            self._use_byte_tokenizer()
        self.tensors = {
            name: TensorInfo(shape, torch.bfloat16)
            for name, shape in parameter_shapes(self.config).items()
        }
        self._seed = seed

    @property
    def digest_inputs(self) -> Mapping[str, Path | bytes]:
        """The config as given, the recipe and the files."""
        recipe = {"recipe": _RECIPE, "seed": self._seed, "config": self.config}
        return {"random": canonical_json(recipe), **self.files}

    def read(self, name: str) -> torch.Tensor:
        """Values uniform in +-sqrt(3 / columns): variance 1 / columns; norms near 1, biases small.

        Uniform, not normal: integer draws scaled by a power of two and one factor are the same
        bits on every CPU.
        """
        shape = self.tensors[name].shape
        digest = hashlib.sha256(f"{self._seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        if name.endswith("norm.weight"):
            center, width = 1.0, 0.1
        elif name.endswith("bias"):
            center, width = 0.0, 0.1
        else:
            center, width = 0.0, math.sqrt(3.0 / shape[-1])
        values = torch.empty(math.prod(shape), dtype=torch.bfloat16)
        for chunk in torch.split(values, _CHUNK_VALUES):
            draws = torch.randint(
                -32768, 32768, chunk.shape, generator=generator, dtype=torch.int16
            )
            chunk.copy_(draws.float().mul_(width / 32768).add_(center))
        return values.view(shape)

    def read_packed(self, name: str) -> dict[str, torch.Tensor]:
        """Never asked for: no tensor here is quantized."""
        raise AssertionError(f"{name} is not quantized")

    def _use_byte_tokenizer(self) -> None:
        vocab_size = parameter_shapes(self.config)["model.embed_tokens.weight"][0]
        if vocab_size < NUM_TOKENS:
            problem = f"vocab_size {vocab_size} has no room for the {NUM_TOKENS} tokens of the"
            raise InvalidModel(problem=f"{problem} byte tokenizer; put a tokenizer.json beside it")
        self.files = {**byte_tokenizer_files(), **self.files}
