"""Tiny real engines: a random checkpoint, built by the compile daemon's own builder."""

from pathlib import Path
from typing import Any

from compiler_service.builder import BuildRequest, build
from compiler_service.resolve import resolve
from shared.engine import EngineManifest, QuantConfig
from shared.ir import Graph
from shared.store.local import LocalStore
from tests.checkpoints import write_checkpoint


def build_tiny(
    folder: Path, family: str = "llama", quant: str = "fp32", kv_cache: str = "", **sizes: Any
) -> tuple[LocalStore, EngineManifest]:
    """A store under `folder` with one engine, whatever quantizing it costs."""
    checkpoint = write_checkpoint(folder / f"{family}-model", family, **sizes)
    cache = folder / "cache"
    cache.mkdir(exist_ok=True)
    is_measured = bool(kv_cache) or quant not in ("fp32", "bf16")
    recipe = QuantConfig(quant, skip_quality=is_measured, kv_cache=kv_cache)
    resolved = resolve(str(checkpoint), ["cpu"], recipe, family, cache)
    store = LocalStore(folder / "store")
    request = BuildRequest(str(checkpoint), resolved.keys["cpu"], family, cache)
    return store, build(request, store, lambda progress: None)


def graph_of(store: LocalStore, engine: EngineManifest) -> Graph:
    """The graph that the engine runs."""
    text = store.read_all(engine.layer("graph.json").digest).decode()
    return Graph.from_json(text)
