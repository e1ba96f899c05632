"""Small engines for tests of the store: real blobs, real manifests, no model."""

import hashlib
from pathlib import Path

from shared.engine import (
    GRAPH_TYPE,
    WEIGHTS_TYPE,
    Blob,
    EngineDraft,
    EngineKey,
    EngineManifest,
    QuantConfig,
)
from shared.store import LocalStore

# Where a process of a test runs, to import what the test imports.
REPOSITORY = Path(__file__).parents[2]
INT8 = QuantConfig("int8")


def engine_key(
    arch: str = "cpu", model: str = "a", builder: str = "1", quant: QuantConfig = INT8
) -> EngineKey:
    """A key; `model` stands for a checkpoint."""
    return EngineKey(hashlib.sha256(model.encode()).hexdigest(), arch, quant, builder)


def weight_bytes(num_bytes: int, seed: int = 0) -> bytes:
    """Bytes that do not repeat, the same for a seed."""
    return hashlib.shake_256(str(seed).encode()).digest(num_bytes)


def draft_engine(
    store: LocalStore,
    key: EngineKey | None = None,
    model: str = "tiny",
    graph: bytes = b'{"nodes":[]}',
    weights: bytes = weight_bytes(5000),
    format_version: int = 1,
) -> EngineDraft:
    """An engine whose blobs are written and that has no name yet."""
    layers = (
        store.write_blob([graph], GRAPH_TYPE, "graph.json"),
        store.write_blob([weights], WEIGHTS_TYPE, "weights/00000"),
    )
    return EngineDraft(key or engine_key(), model, layers, format_version=format_version)


def publish_engine(
    store: LocalStore,
    key: EngineKey | None = None,
    model: str = "tiny",
    graph: bytes = b'{"nodes":[]}',
    weights: bytes = weight_bytes(5000),
    format_version: int = 1,
) -> EngineManifest:
    """A published engine."""
    return store.publish(draft_engine(store, key, model, graph, weights, format_version))


def blob_files(store: LocalStore) -> set[str]:
    """Digests of the blobs that are there."""
    return {f"sha256:{path.name}" for path in (store.root / "blobs" / "sha256").iterdir()}


def corrupt(store: LocalStore, blob: Blob) -> None:
    """Flips a bit in the middle of a blob."""
    path = store.blob_path(blob.digest)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
