"""Builds for a store elsewhere: made here, pushed there, and sharing what is there already."""

from pathlib import Path

import pytest

from compiler_service.builder import BuildCancelled, BuildRequest
from compiler_service.checkpoints.digest import FileHashes, model_digest
from compiler_service.checkpoints.sources import open_checkpoint
from compiler_service.fingerprints import builder_for
from compiler_service.progress import BuildProgress
from compiler_service.remote_build import build_into
from shared.engine import EngineKey, EngineSelector, QuantConfig
from shared.store import LocalStore
from shared.store.cache import EngineCache
from shared.store.registry_store import RegistryStore
from tests.checkpoints import write_checkpoint
from tests.shared.remote_stores import RecordingRegistry

INT8 = QuantConfig("int8", skip_quality=True)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", "llama")


def request_of(checkpoint: Path, cache_dir: Path, arch: str = "cpu") -> BuildRequest:
    """A build of the checkpoint, as this code would build it."""
    opened = open_checkpoint(str(checkpoint))
    digest = model_digest(opened.digest_inputs, FileHashes(cache_dir), lambda _: None)
    key = EngineKey(digest, arch, INT8, builder_for(arch))
    return BuildRequest(str(checkpoint), key, "tiny", cache_dir)


def test_engine_is_pushed_and_stays_while_there_is_room(
    checkpoint: Path, tmp_path: Path, remote: RegistryStore
) -> None:
    request, seen = request_of(checkpoint, tmp_path / "hashes"), list[BuildProgress]()
    cache = EngineCache(LocalStore(tmp_path / "cache"), 0)
    engine = build_into(remote, cache, request, seen.append)
    assert remote.find(EngineSelector("tiny", "cpu", INT8)) == engine == cache.local.list()[0]
    assert [p.stage for p in seen if p.done_bytes == p.total_bytes > 0][-1] == "push"
    # What another worker has pushed already is not sent again.
    recording = RecordingRegistry(remote.registry)
    small = EngineCache(LocalStore(tmp_path / "another"), 1)
    assert build_into(RegistryStore(recording), small, request, seen.append) == engine
    assert recording.uploads == []
    assert small.local.list() == ()


def test_weights_of_another_arch_are_fetched_instead_of_made(
    checkpoint: Path, tmp_path: Path, remote: RegistryStore
) -> None:
    request = request_of(checkpoint, tmp_path / "hashes")
    build_into(remote, EngineCache(LocalStore(tmp_path / "one"), 0), request, lambda _: None)
    stages = list[str]()

    def stop_at_kernels(progress: BuildProgress) -> None:
        stages.append(progress.stage)
        if progress.stage == "kernels":
            raise BuildCancelled

    gpu = request_of(checkpoint, tmp_path / "hashes", "sm_90")
    with pytest.raises(BuildCancelled):
        build_into(remote, EngineCache(LocalStore(tmp_path / "two"), 0), gpu, stop_at_kernels)
    assert stages[-1] == "kernels"
    assert "quantize" not in stages


def test_cancelled_push_leaves_no_engine(
    checkpoint: Path, tmp_path: Path, remote: RegistryStore
) -> None:
    request, stages = request_of(checkpoint, tmp_path / "hashes"), list[str]()

    def is_cancelled() -> bool:
        return bool(stages) and stages[-1] == "publish"

    cache = EngineCache(LocalStore(tmp_path / "cache"), 0)
    with pytest.raises(BuildCancelled):
        build_into(remote, cache, request, lambda p: stages.append(p.stage), is_cancelled)
    assert remote.list() == ()
