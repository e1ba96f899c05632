"""A sweep of a store in a folder removes what no engine names, and nothing that somebody is about to name."""

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from shared.engine import GRAPH_TYPE
from shared.errors import DiskFull
from shared.store import LocalStore
from tests.shared.engines import REPOSITORY, blob_files, corrupt, engine_key, publish_engine


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
