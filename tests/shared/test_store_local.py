"""The store in a folder: names, selectors, blobs, publishing."""

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.engine import Blob, EngineSelector, QuantConfig
from shared.errors import BlobNotFound, EngineNotFound, InvalidField
from shared.store import LocalStore, open_store
from shared.store.remote import GrpcStore
from tests.shared.engines import (
    INT8,
    REPOSITORY,
    blob_files,
    draft_engine,
    engine_key,
    publish_engine,
    weight_bytes,
)


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


def test_stores_open_by_url(tmp_path: Path) -> None:
    engine = publish_engine(LocalStore(tmp_path / "a store"))
    for url in (str(tmp_path / "a store"), f"file://{tmp_path}/a%20store"):
        assert open_store(url).get(engine.name) == engine
    for url in ("ftp://host/path", "file://host/path", "file://", "grpc://", "grpc://host:1/path"):
        with pytest.raises(InvalidField, match="store"):
            open_store(url)
    assert isinstance(open_store("grpc://host:1"), GrpcStore)
