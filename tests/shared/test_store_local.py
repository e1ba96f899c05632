"""The store in a folder: names, selectors, blobs, sweeps."""

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import structlog

from shared.engine import GRAPH_TYPE, Blob, EngineSelector, QuantConfig, Signature
from shared.errors import BlobNotFound, DigestMismatch, DiskFull, EngineNotFound, InvalidField
from shared.store import LocalStore, oci, open_store
from shared.store.remote import GrpcStore
from tests.shared.engines import (
    INT8,
    draft_engine,
    engine_key,
    publish_engine,
    weight_bytes,
)

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def blob_files(store: LocalStore) -> set[str]:
    return {f"sha256:{path.name}" for path in (store.root / "blobs" / "sha256").iterdir()}


def corrupt(store: LocalStore, blob: Blob) -> None:
    path = store.blob_path(blob.digest)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_blob_is_named_by_its_content(store: LocalStore) -> None:
    blob = store.write_blob([b"ab", bytearray(b"c"), memoryview(b"d")], "text/plain", "note")
    assert blob == Blob("text/plain", f"sha256:{hashlib.sha256(b'abcd').hexdigest()}", 4, "note")
    assert store.blob_path(blob.digest).read_bytes() == b"abcd"
    assert b"".join(store.read(blob.digest)) == b"abcd"
    assert b"".join(store.read(blob.digest, 3)) == b"d"
    assert b"".join(store.read(blob.digest, 4)) == b""


def test_empty_blob_is_a_blob(store: LocalStore) -> None:
    blob = store.write_blob([], "text/plain")
    assert blob.size_bytes == 0
    assert list(store.read(blob.digest)) == []


def test_reading_refuses_what_is_not_there(store: LocalStore) -> None:
    blob = store.write_blob([b"abcd"], "text/plain")
    with pytest.raises(BlobNotFound):
        store.read("sha256:" + "0" * 64)
    with pytest.raises(InvalidField, match="digest"):
        store.read("sha256:../../etc/passwd")
    for offset in (-1, 5):
        with pytest.raises(InvalidField, match="offset_bytes"):
            store.read(blob.digest, offset)


def test_blob_that_fails_half_way_leaves_nothing(store: LocalStore) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"half"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.write_blob(chunks(), "text/plain")
    assert not blob_files(store)
    assert not list((store.root / "partial").iterdir())


def test_published_engine_is_found_by_every_name(store: LocalStore) -> None:
    engine = publish_engine(store)
    digest = engine.key.digest
    for name in (f"engines/{digest}", digest, digest[:6], f"engines/{digest[:12]}"):
        assert store.get(name) == engine
    for model in ("tiny", engine.key.model_digest):
        assert store.find(EngineSelector(model, "cpu", INT8)) == engine
    assert store.list() == (engine,)
    assert LocalStore(store.root).get(digest) == engine


def test_engine_is_not_found_by_other_names(store: LocalStore) -> None:
    engine = publish_engine(store)
    digest = engine.key.digest
    other = ("0" if digest[0] != "0" else "1") + digest[1:]
    for name in (other, digest[:5], "", "../" + digest, digest.upper(), "*" * 64):
        with pytest.raises(EngineNotFound):
            store.get(name)
    selectors = (
        EngineSelector("other", "cpu", INT8),
        EngineSelector("tiny", "sm_90", INT8),
        EngineSelector("tiny", "cpu", QuantConfig("int8", 64)),
        EngineSelector("tiny/cpu", "", INT8),
    )
    assert [store.find(selector) for selector in selectors] == [None] * 4


def test_selector_names_the_kv_cache(store: LocalStore) -> None:
    """Else whoever asks for bf16 would be given a cache that loses something."""
    plain = publish_engine(store, engine_key(quant=QuantConfig("bf16")))
    fp8 = publish_engine(store, engine_key(quant=QuantConfig("bf16", kv_cache="fp8")))
    assert store.find(EngineSelector("tiny", "cpu", QuantConfig("bf16"))) == plain
    asked = EngineSelector("tiny", "cpu", QuantConfig("bf16", kv_cache="fp8"))
    assert store.find(asked) == fp8
    assert store.find(EngineSelector("tiny", "cpu", QuantConfig("bf16", kv_cache="int8"))) is None


def test_default_group_size_and_its_value_are_one_selector(store: LocalStore) -> None:
    engine = publish_engine(store, engine_key(quant=QuantConfig("int4", 64)))
    assert store.find(EngineSelector("tiny", "cpu", QuantConfig("int4"))) == engine
    assert store.find(EngineSelector("tiny", "cpu", QuantConfig("int4", 64))) == engine
    assert store.find(EngineSelector("tiny", "cpu", QuantConfig("int4", 32))) is None


def test_prefix_that_fits_two_engines_is_refused(store: LocalStore) -> None:
    # 6 characters collide once in 2**24; a prefix is shared here by making a twin's file.
    engine = publish_engine(store)
    record = store.root / "engines" / engine.key.digest
    twin = engine.key.digest[:10] + "".join(
        "0" if c != "0" else "1" for c in engine.key.digest[10:]
    )
    (record.parent / twin).write_bytes(record.read_bytes())
    with pytest.raises(EngineNotFound):
        store.get(engine.key.digest[:10])
    assert store.get(engine.key.digest[:11]) == engine


def test_find_gives_the_newest_engine_that_can_be_read(store: LocalStore) -> None:
    selector = EngineSelector("tiny", "cpu", INT8)
    old = publish_engine(store, engine_key(builder="1"))
    new = publish_engine(store, engine_key(builder="2"))
    newest = publish_engine(store, engine_key(builder="3"), format_version=2)
    assert store.list() == (newest, new, old)
    assert store.find(selector) == newest
    assert store.find(selector, max_format=1) == new
    store.delete(new.name)
    assert store.find(selector, max_format=1) == old


def test_second_publish_of_a_key_adopts_the_first(store: LocalStore) -> None:
    first = publish_engine(store, weights=weight_bytes(100, seed=1))
    second = publish_engine(store, weights=weight_bytes(100, seed=2), model="another")
    assert second == first
    assert store.list() == (first,)
    # The second caller's name for the model works all the same.
    assert store.find(EngineSelector("another", "cpu", INT8)) == first


def test_engine_can_have_several_model_names(store: LocalStore) -> None:
    engine = publish_engine(store)
    store.add_model_name(engine, "also")
    assert store.find(EngineSelector("also", "cpu", INT8)) == engine
    store.delete(engine.key.digest)
    assert store.find(EngineSelector("also", "cpu", INT8)) is None


def test_engine_without_all_of_its_blobs_is_not_published(store: LocalStore) -> None:
    draft = draft_engine(store)
    store.blob_path(draft.layers[1].digest).unlink()
    with pytest.raises(BlobNotFound):
        store.publish(draft)
    assert store.list() == ()
    assert store.find(EngineSelector("tiny", "cpu", INT8)) is None


def test_same_draft_gives_the_same_bytes_in_another_store(tmp_path: Path) -> None:
    """Law 3: same key, same bytes, wherever and whenever."""
    one = publish_engine(LocalStore(tmp_path / "one"))
    two = publish_engine(LocalStore(tmp_path / "elsewhere" / "two"))
    assert one.manifest == two.manifest
    assert one.created_s != two.created_s


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


def test_sweep_keeps_what_engines_name_and_removes_the_rest(store: LocalStore) -> None:
    kept = publish_engine(store, engine_key("cpu"))
    doomed = publish_engine(store, engine_key("sm_90"), graph=b"other graph")
    loose = store.write_blob([b"loose"], "text/plain")
    assert kept.layers[1] == doomed.layers[1]
    store.delete(doomed.name)
    assert store.sweep(grace_s=3600).num_blobs == 0
    swept = store.sweep(grace_s=0)
    assert swept.num_blobs >= 3
    assert swept.num_bytes >= doomed.layers[0].size_bytes + loose.size_bytes
    gone = {loose.digest, doomed.layers[0].digest, doomed.manifest.digest}
    assert not gone & blob_files(store)
    store.verify(store.get(kept.name))
    index = json.loads((store.root / "index.json").read_bytes())
    assert {raw["digest"] for raw in index["manifests"]} <= blob_files(store)


def test_sweep_keeps_the_blobs_of_an_incomplete_engine(store: LocalStore) -> None:
    engine = publish_engine(store)
    store.blob_path(engine.layers[0].digest).unlink()
    store.sweep(grace_s=0)
    assert engine.layers[1].digest in blob_files(store)


@pytest.mark.parametrize("is_read_first", [False, True])
def test_sweep_passes_over_a_corrupt_manifest(store: LocalStore, is_read_first: bool) -> None:
    """It must not wait for itself; so it runs in a process that can be ended."""
    bad = publish_engine(store, engine_key("cpu"), graph=b"bad")
    good = publish_engine(store, engine_key("sm_90"), graph=b"good")
    corrupt(store, bad.manifest)
    if is_read_first:
        assert len(store.list()) == 1
    script = (
        "import sys; from shared.store import LocalStore\nLocalStore(sys.argv[1]).sweep(grace_s=0)"
    )
    command = [sys.executable, "-c", script, str(store.root)]
    subprocess.run(command, check=True, timeout=120, cwd=REPOSITORY)
    store.verify(store.get(good.name))
    assert store.list() == (good,)
    assert publish_engine(store, bad.key, graph=b"bad").manifest == bad.manifest


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


def test_pinned_blobs_survive_a_sweep_until_released(store: LocalStore) -> None:
    old = store.write_blob([b"old"], "text/plain")
    with store.pin() as pin:
        written = store.write_blob([b"written"], "text/plain")
        named = store.write_blob([b"named"], "text/plain")
        pin.add(named.digest)
        assert store.adopt(old)
        assert LocalStore(store.root).sweep(grace_s=0).num_blobs == 0
        assert blob_files(store) == {old.digest, written.digest, named.digest}
    assert store.sweep(grace_s=0).num_blobs == 3
    assert not list((store.root / "pins").iterdir())


def test_hold_that_fails_half_way_keeps_nothing(store: LocalStore) -> None:
    """Its pin would keep blobs, and a file open, for as long as the process lives."""
    blob = store.write_blob([b"held"], GRAPH_TYPE)

    def digests() -> Iterator[str]:
        yield blob.digest
        raise OSError(errno.ENOSPC, "no room for the other one")

    with pytest.raises(DiskFull):
        store.blobs.hold(digests())
    assert store.sweep(grace_s=0).num_blobs == 1
    assert not list((store.root / "pins").iterdir())


def test_pin_dies_with_its_process(store: LocalStore) -> None:
    script = (
        "import sys; from shared.store import LocalStore; store = LocalStore(sys.argv[1])\n"
        "with store.pin():\n"
        "    print(store.write_blob([b'abc'], 'text/plain').digest, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script, str(store.root)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    ) as child:
        assert child.stdout is not None
        digest = child.stdout.readline().strip()
        assert store.sweep(grace_s=0).num_blobs == 0
        assert digest in blob_files(store)
        child.kill()
    assert store.sweep(grace_s=0).num_blobs == 1
    assert not list((store.root / "pins").iterdir())


def test_sweep_leaves_a_blob_that_is_being_written_alone(store: LocalStore) -> None:
    abandoned = store.root / "partial" / "abandoned"
    abandoned.write_bytes(b"x")
    with store.pin(), store.blob_writer("text/plain") as writer:
        writer.write(b"first")
        store.sweep(grace_s=0)
        writer.write(b"second")
    assert b"".join(store.read(writer.blob.digest)) == b"firstsecond"
    assert not abandoned.exists()


def test_sweep_keeps_young_blobs(store: LocalStore) -> None:
    young = store.write_blob([b"young"], "text/plain")
    old = store.write_blob([b"old"], "text/plain")
    an_hour_ago = time.time() - 3600
    os.utime(store.blob_path(old.digest), (an_hour_ago, an_hour_ago))
    assert store.sweep(grace_s=1800).num_blobs == 1
    assert blob_files(store) == {young.digest}


def test_two_processes_publish_one_engine(store: LocalStore) -> None:
    """Law 7: two compile daemons on one key make one engine; here with different bytes."""
    script = (
        "import sys; from shared.store import LocalStore; from tests.shared.engines import *\n"
        "store = LocalStore(sys.argv[1])\n"
        "draft = draft_engine(store, weights=weight_bytes(100, seed=int(sys.argv[2])))\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "print(store.publish(draft).manifest.digest, flush=True)\n"
    )
    children = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(store.root), str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
        )
        for seed in range(4)
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    manifests = {child.communicate("go\n")[0] for child in children}
    assert [child.returncode for child in children] == [0] * 4
    (engine,) = store.list()
    assert manifests == {f"{engine.manifest.digest}\n"}
    store.verify(engine)


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


def test_stores_open_by_url(tmp_path: Path) -> None:
    engine = publish_engine(LocalStore(tmp_path / "a store"))
    for url in (str(tmp_path / "a store"), f"file://{tmp_path}/a%20store"):
        assert open_store(url).get(engine.name) == engine
    for url in ("ftp://host/path", "file://host/path", "file://", "grpc://", "grpc://host:1/path"):
        with pytest.raises(InvalidField, match="store"):
            open_store(url)
    assert isinstance(open_store("grpc://host:1"), GrpcStore)


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
