"""A store in a folder with damaged files, or on a full disk: no other engine is hidden, nothing bad is served."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import structlog

from shared.engine import EngineSelector, Signature
from shared.errors import BlobNotFound, DigestMismatch, DiskFull, EngineNotFound
from shared.store import LocalStore, oci
from tests.shared.engines import INT8, REPOSITORY, corrupt, engine_key, publish_engine, weight_bytes


@pytest.mark.parametrize("damage", ["flip", "truncate", "extend", "empty"])
def test_corrupt_blob_is_refused_and_made_again(store: LocalStore, damage: str) -> None:
    """Law 7: a corrupt blob is never served."""
    engine = publish_engine(store)
    blob = engine.layer("weights/00000")
    path = store.blob_path(blob.digest)
    content = path.read_bytes()
    damaged = {
        "flip": bytes([content[0] ^ 1]) + content[1:],
        "truncate": content[:-1],
        "extend": content + b"\0",
        "empty": b"",
    }[damage]
    path.write_bytes(damaged)
    with pytest.raises(DigestMismatch) as caught:
        store.read(blob.digest)
    assert caught.value.fields["digest"] == blob.digest
    # It is set aside: the engine is as good as absent, and publishing it again repairs it.
    with pytest.raises(BlobNotFound):
        store.read(blob.digest)
    assert store.find(EngineSelector("tiny", "cpu", INT8)) is None
    assert not store.adopt(blob)
    again = publish_engine(store)
    assert again.manifest == engine.manifest
    store.verify(again)
    assert b"".join(store.read(blob.digest)) == content


def test_corruption_after_a_good_read_is_seen(store: LocalStore) -> None:
    engine = publish_engine(store)
    store.verify(engine)
    corrupt(store, engine.layers[0])
    with pytest.raises(DigestMismatch):
        store.verify(engine)


def test_corrupt_manifest_hides_the_engine(store: LocalStore) -> None:
    engine = publish_engine(store)
    corrupt(store, engine.manifest)
    with pytest.raises(EngineNotFound):
        store.get(engine.name)
    assert store.list() == ()
    assert publish_engine(store).manifest == engine.manifest


def test_incomplete_engine_is_replaced_by_a_later_publish(store: LocalStore) -> None:
    first = publish_engine(store, weights=weight_bytes(100, seed=1))
    store.blob_path(first.layers[1].digest).unlink()
    second = publish_engine(store, weights=weight_bytes(100, seed=2))
    assert second.layers[1] != first.layers[1]
    assert store.get(first.name) == second


def test_new_selector_survives_a_loss_of_power(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder is on the disk when it and the folder that names it were synced."""
    synced: list[str] = []
    fsync = os.fsync

    def noted_fsync(fd: int) -> None:
        fsync(fd)
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))

    monkeypatch.setattr(os, "fsync", noted_fsync)
    publish_engine(store)
    selectors = store.root / "selectors"
    made = [str(folder) for folder in selectors.iterdir()]
    assert len(made) == 2
    for folder in made:
        assert str(selectors) in synced[synced.index(folder) :]


# A mebibyte of room.
FULL_DISK = """
import sys
from shared.errors import DiskFull
from shared.store import LocalStore, pull
from tests.shared.engines import engine_key, publish_engine, weight_bytes
store = LocalStore(sys.argv[1])
first = publish_engine(store)
try:
    publish_engine(store, engine_key('sm_90'), weights=weight_bytes(4 << 20))
except DiskFull as error:
    print(error)
assert store.list() == (first,)
store.verify(first)
assert not list((store.root / 'partial').iterdir())
source = LocalStore(sys.argv[1] + '-source')
large = publish_engine(source, engine_key('sm_80'), weights=weight_bytes(4 << 20))
try:
    pull(source, large, store)
except DiskFull as error:
    print(error)
assert store.list() == (first,)
(partial,) = (store.root / 'partial').iterdir()
partial.unlink()
publish_engine(store, engine_key('sm_90'), graph=b'small')
"""

READ_ONLY = """
import sys
from shared.errors import DigestMismatch
from shared.store import LocalStore
store = LocalStore(sys.argv[1])
good, corrupt = sorted(store.list(), key=lambda engine: engine.model)
store.verify(good)
try:
    store.verify(corrupt)
except DigestMismatch as error:
    print(error.fields['digest'])
assert store.list() == (good, corrupt) or store.list() == (corrupt, good)
"""


def run_mounted(mount: str, script: str, root: Path) -> str:
    """What a Python script prints that runs with `mount` in a mount namespace of its own."""
    own_mounts = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["-Ur"])]
    probe = [*own_mounts, "mount", "-t", "tmpfs", "none", "/mnt"]
    probed = subprocess.run(probe, capture_output=True, text=True)
    if probed.returncode != 0:
        pytest.skip(f"no mount namespaces here: {probed.stderr.strip()}")
    command = f'{mount} && exec {sys.executable} -c "$0" {root}'
    run = subprocess.run(
        [*own_mounts, "sh", "-c", command, script],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_full_disk_is_an_error_of_ours_and_leaves_no_half_engine(tmp_path: Path) -> None:
    """Law 7: a full disk is DISK_FULL, and no half engine is visible."""
    printed = run_mounted(f"mount -t tmpfs -o size=1m none {tmp_path}", FULL_DISK, tmp_path)
    assert printed == f"{DiskFull(path=tmp_path)}\n" * 2


def test_store_that_cannot_be_written_is_read_and_refuses_corrupt_blobs(store: LocalStore) -> None:
    publish_engine(store, engine_key(model="good"), "good")
    bad = publish_engine(store, engine_key(model="bad"), "tampered", weights=weight_bytes(99, 1))
    corrupt(store, bad.layers[1])
    mount = f"mount --bind {store.root} {store.root} && mount -o remount,ro,bind {store.root}"
    assert run_mounted(mount, READ_ONLY, store.root) == f"{bad.layers[1].digest}\n"


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "half": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    # What is JSON still, as a tool or an older version may leave it.
    "no fields": lambda content: b"{}",
    "a list": lambda content: b"[1]",
    "null": lambda content: b"null",
    "words for values": lambda content: re.sub(rb":[^,{}\[\]]+", b':"word"', content),
}


def damage_file(path: Path, damage: str) -> None:
    """What a disk, a file system or somebody's tool can leave of a small file."""
    path.write_bytes(DAMAGES[damage](path.read_bytes()))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_record_hides_no_other_engine_and_is_made_anew(
    store: LocalStore, damage: str
) -> None:
    good = publish_engine(store, engine_key(builder="good"))
    bad = publish_engine(store, engine_key(builder="bad"))
    record = store.root / "engines" / bad.key.digest
    damage_file(record, damage)
    again = LocalStore(store.root)
    with structlog.testing.capture_logs() as logs:
        assert again.list() == again.list() == (good,)
    told = [line for line in logs if line["event"] == "store_record_passed_over"]
    assert [line["record"] for line in told] == [str(record)], "once, and by its name"
    assert again.find(EngineSelector("tiny", "cpu", INT8)) == good
    with pytest.raises(EngineNotFound):
        again.get(bad.name)
    again.sweep(grace_s=0.0)
    again.verify(good)
    mended = publish_engine(again, engine_key(builder="bad"))
    assert again.get(bad.name) == mended
    again.verify(mended)
    assert {engine.name for engine in again.list()} == {good.name, bad.name}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_index_is_written_anew_by_the_next_sweep(store: LocalStore, damage: str) -> None:
    engine = publish_engine(store)
    index = store.root / "index.json"
    whole = index.read_bytes()
    damage_file(index, damage)
    again = LocalStore(store.root)
    assert again.list() == (engine,)
    again.sweep(grace_s=0.0)
    assert index.read_bytes() == whole
    again.verify(engine)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_signature_signs_nothing_and_hides_no_engine(
    store: LocalStore, damage: str
) -> None:
    engine = publish_engine(store)
    signed = store.add_signature(engine, Signature(b"k" * 32, b"s" * 64))
    assert signed.signatures
    (record,) = (store.root / "signatures" / engine.key.digest).iterdir()
    damage_file(record, damage)
    assert LocalStore(store.root).get(engine.name) == engine
    store.sweep(grace_s=0.0)
    store.verify(engine)


@pytest.mark.parametrize("created_s", ["soon", None, float("nan"), [1.0]])
def test_record_without_a_time_hides_no_other_engine(store: LocalStore, created_s: object) -> None:
    good = publish_engine(store, engine_key(builder="good"))
    bad = publish_engine(store, engine_key(builder="bad"))
    record = store.root / "engines" / bad.key.digest
    record.write_text(json.dumps({**json.loads(record.read_text()), "created_s": created_s}))
    again = LocalStore(store.root)
    assert again.list() == (good,)
    assert again.find(EngineSelector("tiny", "cpu", INT8)) == good


def test_record_of_what_is_no_engine_hides_no_other(store: LocalStore) -> None:
    """Its blob is good, and another tool's."""
    good = publish_engine(store, engine_key(builder="good"))
    bad = publish_engine(store, engine_key(builder="bad"))
    record = store.root / "engines" / bad.key.digest
    theirs = store.write_blob([b'{"layers":[{"digest":1}]}'], "application/json")
    record.write_text(json.dumps({"manifest": oci.descriptor(theirs), "created_s": 1.0}))
    again = LocalStore(store.root)
    assert again.list() == (good,)
    again.sweep(grace_s=0.0)
    again.verify(good)
    assert publish_engine(again, engine_key(builder="bad")) in again.list()
