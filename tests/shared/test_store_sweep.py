"""What deleted engines leave in a store elsewhere, and who may change one tag at once."""

import json
import subprocess
import sys
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import obstore
import pytest

from shared.engine import Blob, EngineSelector, Signature
from shared.errors import InvalidField
from shared.store import LocalStore, oci, pull
from shared.store.oci_registry import OciRegistry
from shared.store.registry import TagMoved
from shared.store.registry_store import RegistryStore
from shared.store.s3 import S3Registry
from tests.shared.engines import INT8, engine_key, publish_engine, weight_bytes
from tests.shared.remote_stores import BUCKET, RecordingRegistry, opened

ALIAS = "known-as"


def entries(url: str) -> set[str]:
    """The engines that the index of the alias lists."""
    found = opened(url).registry.manifest(oci.index_ref(ALIAS, INT8))
    assert found is not None
    return {entry.manifest.digest for entry in oci.entries_of(found[1])}


def test_changes_of_one_tag_at_once_lose_none(
    url: str, remote: RegistryStore, local: LocalStore
) -> None:
    engines = [publish_engine(local, engine_key(builder=str(i))) for i in range(5)]
    for engine in engines:
        remote.push(local, engine)
    signatures = [Signature(bytes([i]) * 32, b"s" * 64) for i in range(5)]

    def change(place: int) -> None:
        store = opened(url)
        store.add_model_name(engines[place], ALIAS)
        store.add_signature(engines[0], signatures[place])

    with ThreadPoolExecutor(5) as pool:
        list(pool.map(change, range(5)))
    assert entries(url) == {engine.manifest.digest for engine in engines}
    assert set(opened(url).get(engines[0].name).signatures) == set(signatures)


class LateRegistry(RecordingRegistry):
    """A registry over HTTP whose writer of a tag stands still between its look and its write."""

    def __init__(self, registry: OciRegistry, may_write: threading.Event) -> None:
        super().__init__(registry)
        self.has_looked = threading.Event()
        self._may_write = may_write
        host, _, name = registry.url.removeprefix("oci+http://").partition("/")
        self._root = f"http://{host}/v2/{name}/manifests"

    def put_manifest(
        self, content: bytes, media_type: str, tag: str = "", replaces: str | None = None
    ) -> Blob:
        there = self.manifest(tag)
        if (None if there is None else there[0].digest) != replaces:
            raise TagMoved
        self.has_looked.set()
        assert self._may_write.wait(30)
        request = urllib.request.Request(
            f"{self._root}/{tag}", content, {"Content-Type": media_type}, method="PUT"
        )
        urllib.request.urlopen(request).close()
        return oci.blob_from(content, media_type)


class TellingRegistry(RecordingRegistry):
    """A registry that tells when a manifest was put there."""

    def __init__(self, registry: OciRegistry) -> None:
        super().__init__(registry)
        self.has_written = threading.Event()

    def put_manifest(
        self, content: bytes, media_type: str, tag: str = "", replaces: str | None = None
    ) -> Blob:
        try:
            return super().put_manifest(content, media_type, tag, replaces)
        finally:
            self.has_written.set()


def test_a_slower_writer_that_undoes_a_change_does_not_have_the_last_word(
    oci_url: str, local: LocalStore
) -> None:
    """It looked before the other wrote, and a registry without conditions lets it."""
    one, two = (publish_engine(local, engine_key(builder=str(i))) for i in range(2))
    for engine in (one, two):
        opened(oci_url).push(local, engine)
    quick = TellingRegistry(OciRegistry.from_url(oci_url))
    late = LateRegistry(OciRegistry.from_url(oci_url), quick.has_written)
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(RegistryStore(late).add_model_name, one, ALIAS)
        assert late.has_looked.wait(30)
        pool.submit(RegistryStore(quick).add_model_name, two, ALIAS).result()
        slow.result()
    assert entries(oci_url) == {one.manifest.digest, two.manifest.digest}


def test_a_sweep_frees_what_nothing_names_and_leaves_what_is_young(
    s3_url: str, local: LocalStore, tmp_path: Path
) -> None:
    remote = opened(s3_url)
    shared, alone = (weight_bytes(2000, seed) for seed in range(2))
    stays = publish_engine(local, engine_key(builder="1"), weights=shared)
    goes = publish_engine(local, engine_key(builder="2"), weights=alone)
    for engine in (stays, goes):
        remote.push(local, engine)
    stays = remote.add_signature(stays, Signature(b"k" * 32, b"s" * 64))
    remote.delete(goes.name)
    assert remote.sweep().num_blobs == 0
    swept = remote.sweep(grace_s=0)
    assert swept.num_blobs > 0
    assert swept.num_bytes > 2000
    gone = {blob.digest for blob in goes.layers} - {blob.digest for blob in stays.layers}
    assert gone
    assert not any(remote.registry.has(digest) for digest in gone)
    fresh = opened(s3_url)
    assert pull(fresh, fresh.get(stays.name), LocalStore(tmp_path / "other")) == stays
    assert fresh.find(EngineSelector("tiny", "cpu", INT8)) == stays
    assert remote.sweep(grace_s=0).num_blobs == 0


def test_a_push_beside_sweeps_is_whole_whatever_they_took(
    s3_url: str, local: LocalStore, tmp_path: Path
) -> None:
    """Before each of its writes all that nothing names yet is swept, as if it were a day old."""
    engine = publish_engine(local, engine_key(), weights=weight_bytes(3000))
    swept: list[int] = []

    def sweep(_: int) -> None:
        swept.append(opened(s3_url).sweep(grace_s=0).num_blobs)

    registry = RecordingRegistry(S3Registry.from_url(s3_url), sweep)
    assert RegistryStore(registry).push(local, engine) == engine
    assert sum(swept) > 0
    assert pull(opened(s3_url), engine, LocalStore(tmp_path / "other")) == engine


def test_a_blob_that_a_push_goes_on_with_is_as_young_as_a_new_one(
    s3_url: str, local: LocalStore
) -> None:
    engine = publish_engine(local, engine_key())
    opened(s3_url).push(local, engine)
    prefix = s3_url.removeprefix(f"s3://{BUCKET}/")
    registry: Any = S3Registry(BUCKET, prefix, young_s=-1e9)
    digest = engine.layers[0].digest
    path = f"blobs/sha256/{digest.removeprefix('sha256:')}"
    before = obstore.head(registry._objects, path)["last_modified"]
    while obstore.head(registry._objects, path)["last_modified"] == before:  # whole seconds
        assert registry.adopt(digest)
    assert obstore.head(registry._objects, path)["last_modified"] > before
    assert b"".join(registry.read(digest)) == local.read_all(digest)
    assert not [one for page in obstore.list(registry._objects, "fresh/") for one in page]
    assert not registry.adopt("sha256:" + "0" * 64)


def sweep_command(store: str) -> tuple[int, str, str]:
    """Exit code, output and complaint of `millrace store sweep`."""
    done = subprocess.run(
        [sys.executable, "-m", "millrace.cli", "store", "sweep", store, "--json"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_the_command_sweeps_a_folder_and_a_bucket_and_says_why_nothing_else(
    s3_url: str, oci_url: str, local: LocalStore, tmp_path: Path
) -> None:
    engine = publish_engine(local, engine_key())
    opened(s3_url).push(local, engine)
    for store in (str(local.root), s3_url):
        code, out, complaint = sweep_command(store)
        assert code == 0, complaint
        assert json.loads(out) == {"blobs": 0, "bytes": 0}
    with pytest.raises(InvalidField):
        opened(oci_url).sweep()
    for store, says in (
        (oci_url, "own garbage collection"),
        (str(tmp_path / "nowhere"), "there is none"),
        ("grpc://127.0.0.1:1", "swept by the daemon"),
    ):
        code, out, complaint = sweep_command(store)
        assert (code, out) == (1, "")
        assert says in complaint
    assert not (tmp_path / "nowhere").exists()


def test_the_command_tells_of_a_record_that_makes_no_sense_beside_its_output(
    local: LocalStore,
) -> None:
    engine = publish_engine(local, engine_key())
    record = local.root / "engines" / engine.key.digest
    record.write_text("{}")
    code, out, told = sweep_command(str(local.root))
    assert (code, json.loads(out)) == (0, {"blobs": 0, "bytes": 0}), "what is young stays"
    assert told.count("store_record_passed_over") == 1
    assert str(record) in told


def test_a_registry_that_follows_conditions_has_the_last_word() -> None:
    """It is told what is to be replaced, and that it was not is what its 412 says."""
    old = oci.blob_from(b"{}", oci.INDEX_TYPE)
    asked: list[dict[str, str | None]] = []

    class Strict(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_there = self.path.endswith("/known")
            self.send_response(200 if is_there else 404)
            self.send_header("Content-Type", oci.INDEX_TYPE)
            self.end_headers()
            if is_there:
                self.wfile.write(b"{}")

        def do_PUT(self) -> None:
            asked.append({name: self.headers[name] for name in ("If-Match", "If-None-Match")})
            self.send_response(412)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Strict) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        registry = OciRegistry(f"127.0.0.1:{server.server_port}", "test", is_plain=True)
        with pytest.raises(TagMoved):
            registry.put_manifest(b"[]", oci.INDEX_TYPE, "known", replaces=old.digest)
        with pytest.raises(TagMoved):
            registry.put_manifest(b"[]", oci.INDEX_TYPE, "unknown")
        server.shutdown()
    assert asked == [
        {"If-Match": f'"{old.digest}"', "If-None-Match": None},
        {"If-Match": None, "If-None-Match": "*"},
    ]
