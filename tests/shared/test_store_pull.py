"""A pull gives one whole engine, and ends at its first failure."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.engine import WEIGHTS_TYPE, EngineDraft, EngineManifest, Signature
from shared.errors import BlobNotFound
from shared.store import LocalStore, pull
from tests.shared.engines import engine_key, publish_engine, weight_bytes

NUM_BLOBS = 200


def test_what_is_said_of_another_engine_of_the_key_is_not_kept(tmp_path: Path) -> None:
    """First publish wins here; a signature or a tuning record is of one manifest."""
    source, local = LocalStore(tmp_path / "source"), LocalStore(tmp_path / "local")
    there = publish_engine(source, weights=weight_bytes(5000, 1))
    here = publish_engine(local, weights=weight_bytes(5000, 2))
    assert (there.name, there.manifest != here.manifest) == (here.name, True)
    there = source.add_signature(there, Signature(b"k" * 32, b"s" * 64))
    there = source.add_tuning(there, "GPU", b"{}")
    assert pull(source, there, local) == here
    assert (local.get(here.name).signatures, local.get(here.name).tunings) == ((), ())


def test_first_blob_that_fails_keeps_the_rest_from_being_fetched(tmp_path: Path) -> None:
    """Else who pulls 100 GB is told after the last of them that the first one is lost."""
    source = _Blocking(tmp_path / "source")
    engine = _engine_of_many_blobs(source)
    source.lost = engine.layers[0].digest
    source.blob_path(source.lost).unlink()
    with pytest.raises(BlobNotFound):
        pull(source, engine, LocalStore(tmp_path / "local"))
    weights = [digest for digest in source.begun if digest != source.lost]
    assert len(weights) < NUM_BLOBS


class _Blocking(LocalStore):
    """Gives no blob of weights before the lost one was asked for."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.lost = ""
        self.begun: list[str] = []
        self._was_asked = threading.Event()

    def read(self, digest: str, offset: int = 0) -> Iterator[bytes]:
        if self.lost:
            self.begun.append(digest)
        if digest == self.lost:
            self._was_asked.set()
        elif self.blobs.path(digest).stat().st_size == len(weight_bytes(5000)):
            self._was_asked.wait()
        return super().read(digest, offset)


def _engine_of_many_blobs(store: LocalStore) -> EngineManifest:
    layers = [
        store.write_blob([weight_bytes(5000, seed)], WEIGHTS_TYPE, f"weights/{seed:05}")
        for seed in range(NUM_BLOBS)
    ]
    return store.publish(EngineDraft(engine_key(), "tiny", tuple(layers), {}))
