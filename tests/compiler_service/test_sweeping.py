"""The daemon frees what deleted engines left, hour after hour, whatever is in its store."""

import os
import threading
from pathlib import Path

import pytest

from compiler_service.daemon import sweep_regularly
from shared.background import Background
from shared.errors import DiskFull
from shared.store import LocalStore
from shared.store.blobs import Sweep
from shared.store.local import DEFAULT_GRACE_S
from tests.compiler_service.build_helpers import eventually
from tests.shared.engines import engine_key, publish_engine


class FailingOnce(LocalStore):
    """A store whose first sweep finds the disk full."""

    problem: Exception = DiskFull(path="/store")

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.has_failed = threading.Event()

    def sweep(self, grace_s: float = DEFAULT_GRACE_S) -> Sweep:
        if not self.has_failed.is_set():
            self.has_failed.set()
            raise self.problem
        return super().sweep(grace_s)


class OddOnce(FailingOnce):
    """A store whose first sweep fails in a way that nobody thought of."""

    problem = RuntimeError("nobody thought of this")


@pytest.mark.parametrize("kind", [LocalStore, FailingOnce, OddOnce])
async def test_old_garbage_goes_and_engines_stay(tmp_path: Path, kind: type[LocalStore]) -> None:
    store = kind(tmp_path)
    engine = publish_engine(store, engine_key("cpu"))
    garbage = store.blob_path(store.write_blob([b"garbage"], "text/plain").digest)
    young = store.blob_path(store.write_blob([b"young"], "text/plain").digest)
    for path in (tmp_path / "blobs" / "sha256").iterdir():
        if path != young:
            os.utime(path, (0, 0))
    background = Background()
    background.keep("sweep", lambda: sweep_regularly(store, interval_s=0.01))
    try:
        await eventually(lambda: not garbage.exists())
    finally:
        await background.close()
    assert young.exists()
    store.verify(store.get(engine.name))
