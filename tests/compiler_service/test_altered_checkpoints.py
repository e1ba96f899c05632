"""Quantized checkpoints with something wrong in them: each is built, or refused with one line."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compiler_service.builder import BuildRequest, build
from compiler_service.resolve import resolve
from shared.engine import QuantConfig
from shared.errors import MillraceError
from shared.store.local import LocalStore
from tests.checkpoints import write_checkpoint
from tests.compiler_service.gguf_files import write_gguf
from tests.compiler_service.quantized_folders import (
    awq,
    compressed_bytes,
    compressed_packed,
    gptq,
    write_quantized,
)

FOLDERS = {
    "AWQ": awq(),
    "GPTQ": gptq(symmetric=False),
    "GPTQ 8-bit": gptq(8),
    "compressed 4-bit": compressed_packed(symmetric=False),
    "compressed FP8": compressed_bytes(torch.float8_e4m3fn),
    "compressed INT8": compressed_bytes(torch.int8),
}
GGUF_KINDS = ("Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")
# K-quants have blocks of 256 values.
BLOCKS_OF_256 = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
NUM_ALTERED = 60

ODD = (None, 0, -1, 3, 64, 1 << 40, 2.5, float("inf"), True, "", "32", [], [1], {}, {"a": 1})
DTYPES = (torch.int32, torch.int64, torch.float16, torch.float64, torch.bool, torch.uint8)
ALTERED: tuple[Callable[[torch.Tensor, random.Random], torch.Tensor | None], ...] = (
    lambda tensor, draw: None,
    lambda tensor, draw: tensor.flatten(),
    lambda tensor, draw: tensor[:0],
    lambda tensor, draw: tensor[None],
    lambda tensor, draw: torch.zeros((), dtype=tensor.dtype),
    lambda tensor, draw: tensor.to(draw.choice(DTYPES)),
    lambda tensor, draw: tensor.mT if tensor.dim() > 1 else -tensor.float(),
    lambda tensor, draw: torch.full_like(tensor.float(), draw.choice((torch.nan, 1e30))).to(
        tensor.dtype
    ),
)


def altered(value: Any, draw: random.Random) -> Any:
    """A copy with a field left out, or with an odd value in its place."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        key = draw.choice(list(value))
        rest = {name: kept for name, kept in value.items() if name != key}
        return rest if draw.random() < 0.15 else {**rest, key: altered(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.7:
        place = draw.randrange(len(value))
        return [*value[:place], altered(value[place], draw), *value[place + 1 :]]
    return draw.choice(ODD)


def alter_folder(folder: Path, draw: random.Random) -> None:
    """One thing, in config.json or in one tensor."""
    config, weights = folder / "config.json", folder / "model.safetensors"
    if draw.random() < 0.5:
        fields = json.loads(config.read_text())
        fields["quantization_config"] = altered(fields["quantization_config"], draw)
        config.write_text(json.dumps(fields))
        return
    tensors = load_file(weights)
    name = draw.choice([name for name in tensors if ".layers." in name and "norm" not in name])
    found = draw.choice(ALTERED)(tensors.pop(name), draw)
    if found is not None:
        tensors[name] = found.contiguous()
    save_file(tensors, weights)


def alter_file(path: Path, draw: random.Random) -> None:
    """Some bytes of the head, or of the blocks."""
    content = bytearray(path.read_bytes())
    at = draw.randrange(draw.choice((4000, len(content))))
    content[at : at + 4] = draw.choice((b"\xff" * 4, b"\0" * 4, b"\x01", b"\x7f\xfe"))
    path.write_bytes(content)


def refusal(model: Path, tmp_path: Path) -> str:
    """What a build says; empty where it makes an engine. Any other exception is the test's."""
    try:
        resolved = resolve(str(model), ["cpu"], QuantConfig("as-is"), "", tmp_path)
        request = BuildRequest(str(model), resolved.keys["cpu"], "tiny", tmp_path)
        build(request, LocalStore(tmp_path / "store"), lambda progress: None)
    except MillraceError as error:
        return str(error)
    return ""


def require_clear(refusals: list[str]) -> None:
    """One line each; some are refused and some are not, or nothing was asked."""
    assert not [said for said in refusals if "\n" in said or len(said) > 600]
    assert "" in refusals
    assert len(set(refusals)) > 2


@pytest.mark.parametrize("name", FOLDERS)
def test_altered_folder_is_built_or_refused_with_one_line(name: str, tmp_path: Path) -> None:
    settings, quantize_one = FOLDERS[name]
    write_quantized(tmp_path / "m", settings, quantize_one)
    whole = {path: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    refusals = []
    for seed in range(NUM_ALTERED):
        for path, content in whole.items():
            path.write_bytes(content)
        alter_folder(tmp_path / "m", random.Random(seed))
        refusals.append(refusal(tmp_path / "m", tmp_path))
    require_clear(refusals)


@pytest.mark.parametrize("kind", GGUF_KINDS)
def test_altered_gguf_is_built_or_refused_with_one_line(kind: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", **BLOCKS_OF_256)
    path = write_gguf(tmp_path / "m.gguf", folder, kind)
    whole = path.read_bytes()
    refusals = []
    for seed in range(NUM_ALTERED):
        path.write_bytes(whole)
        alter_file(path, random.Random(seed))
        refusals.append(refusal(path, tmp_path))
    require_clear(refusals)
