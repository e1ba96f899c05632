"""Law 3, the half that concerns models: digests are honest."""

import hashlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from compiler_service.checkpoints.checkpoint import FILE_NAMES
from compiler_service.checkpoints.digest import (
    FileHashes,
    known_model_digest,
    model_digest,
    verify_unchanged,
)
from compiler_service.checkpoints.sources import open_checkpoint
from shared.errors import ModelChanged
from tests.checkpoints import DOWN, write_checkpoint


def _digest(folder: Path, cache: Path) -> str:
    return model_digest(open_checkpoint(str(folder)).digest_inputs, FileHashes(cache))


def test_model_digest_stays_when_the_folder_moves(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "a", num_shards=2)
    before = _digest(folder, tmp_path / "cache")
    shutil.move(folder, tmp_path / "b")
    assert _digest(tmp_path / "b", tmp_path / "other-cache") == before


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", *FILE_NAMES])
def test_model_digest_changes_with_one_byte(name: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    before = _digest(folder, tmp_path)
    content = bytearray((folder / name).read_bytes())
    content[-2 if name.endswith("safetensors") else content.index(b" ")] ^= 3
    if name.endswith(".json"):
        content = bytearray((folder / name).read_bytes() + b" ")
    (folder / name).write_bytes(content)
    assert _digest(folder, tmp_path) != before


def test_folder_of_links_is_the_model_that_they_lead_to(tmp_path: Path) -> None:
    """As the hub's own cache keeps snapshots."""
    folder = write_checkpoint(tmp_path / "blobs", num_shards=2)
    (tmp_path / "snapshot").mkdir()
    for path in folder.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    assert _digest(tmp_path / "snapshot", tmp_path) == _digest(folder, tmp_path / "other-cache")
    checkpoint = open_checkpoint(str(tmp_path / "snapshot"))
    assert torch.equal(checkpoint.read(DOWN), open_checkpoint(str(folder)).read(DOWN))


def test_unchanged_files_are_not_read_again(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", num_shards=2)
    inputs = open_checkpoint(str(folder)).digest_inputs
    read: list[int] = []
    assert known_model_digest(inputs, FileHashes(tmp_path)) is None
    digest = model_digest(inputs, FileHashes(tmp_path), read.append)
    assert sum(read) == sum(path.stat().st_size for path in folder.iterdir())
    assert known_model_digest(inputs, FileHashes(tmp_path)) == digest
    assert model_digest(inputs, FileHashes(tmp_path), lambda n: pytest.fail("read")) == digest


@pytest.mark.parametrize(
    "content", ['{"cut', "[" * 100_000, "[1]", '{"FILE": 3}'], ids=["cut", "deep", "list", "number"]
)
def test_corrupt_hash_cache_costs_time_and_nothing_else(content: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m")
    before = _digest(folder, tmp_path)
    content = content.replace("FILE", str((folder / "config.json").resolve()))
    (tmp_path / "file_hashes.json").write_text(content)
    assert _digest(folder, tmp_path) == before


def test_change_is_found_although_size_and_time_stay(tmp_path: Path) -> None:
    """The second hashing reads bytes; a clock that was set back deceives only the cache."""
    folder = write_checkpoint(tmp_path / "m")
    inputs, hashes = open_checkpoint(str(folder)).digest_inputs, FileHashes(tmp_path)
    digest = model_digest(inputs, hashes)
    verify_unchanged(inputs, hashes, digest)
    path = folder / "model.safetensors"
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x99")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(ModelChanged, match=r"model\.safetensors changed"):
        verify_unchanged(inputs, hashes, digest)


def test_hashes_that_are_remembered_side_by_side_are_all_kept(tmp_path: Path) -> None:
    """Each request has a cache object of its own, and all of them one file."""
    files = [tmp_path / f"{number}.bin" for number in range(24)]
    for number, file in enumerate(files):
        file.write_bytes(bytes([number]) * 100)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda file: FileHashes(tmp_path / "cache").sha256(file), files))
    known = [FileHashes(tmp_path / "cache").known(file) for file in files]
    assert known == [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
