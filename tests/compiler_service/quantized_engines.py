"""Engines of tiny checkpoints in a chosen recipe, and what is read back from them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from compiler_service.builder import BuildRequest, build
from compiler_service.progress import BuildProgress
from compiler_service.resolve import resolve
from shared.engine import EngineManifest, QuantConfig
from shared.ir import Graph
from shared.store.local import LocalStore
from tests.checkpoints import write_checkpoint

# Tiny random models suffer more than any limit that a real one should have.
LOOSE = {"max_kl": 99.0, "max_perplexity_increase": 99.0}


def build_quantized(
    folder: Path,
    quant: QuantConfig,
    tmp_path: Path,
    store: LocalStore | None = None,
    calibration_uri: str = "",
    arch: str = "cpu",
    report: Callable[[BuildProgress], None] = lambda progress: None,
) -> tuple[LocalStore, EngineManifest]:
    """The engine of the checkpoint in `folder`, and the store that it is in."""
    cache = tmp_path / "cache"
    resolved = resolve(str(folder), [arch], quant, "", cache, calibration_uri=calibration_uri)
    request = BuildRequest(str(folder), resolved.keys[arch], resolved.model, cache, calibration_uri)
    store = store or LocalStore(tmp_path / "store")
    return store, build(request, store, report)


def write_uneven_checkpoint(folder: Path, family: str = "llama", **sizes: Any) -> Path:
    """A checkpoint a few of whose channels carry far larger activations, as real ones do."""
    write_checkpoint(folder, family, **sizes)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensor[::13] *= 12.0
        if name.endswith(("up_proj.weight", "v_proj.weight")):
            tensor[::11] *= 8.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def graph_of(store: LocalStore, engine: EngineManifest) -> Graph:
    """The graph that the engine runs."""
    return Graph.from_json(store.read_all(engine.layer("graph.json").digest).decode())


def report_of(store: LocalStore, engine: EngineManifest) -> dict[str, Any]:
    """The engine's quality report."""
    report: dict[str, Any] = json.loads(store.read_all(engine.layer("quality.json").digest))
    return report


def softmax_kl(reference_RV: torch.Tensor, quantized_RV: torch.Tensor) -> torch.Tensor:
    """KL divergence of each row, by its definition, in fp64."""
    p, q = reference_RV.double().log_softmax(-1), quantized_RV.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)
