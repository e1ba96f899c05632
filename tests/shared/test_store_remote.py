"""Stores elsewhere, on a real S3 and a real OCI registry: the same laws as on the disk."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import obstore
import pytest
import structlog

from shared.engine import EngineSelector, QuantConfig, Signature, canonical_json
from shared.errors import BlobNotFound, DigestMismatch, EngineNotFound
from shared.store import LocalStore, oci, pull
from shared.store.referrers import (
    EMPTY,
    EMPTY_CONTENT,
    SIGNATURE_TYPE,
    TUNING_ARTIFACT_TYPE,
    referrers_ref,
)
from shared.store.registry_store import RegistryStore
from shared.store.s3 import S3Registry
from tests.shared.engines import INT8, engine_key, publish_engine, weight_bytes
from tests.shared.remote_stores import RecordingRegistry, opened
from tests.shared.tunings import GPU, record_bytes

BIG_BYTES = 3 << 20


def test_store_elsewhere_answers_as_the_local_one(
    remote: RegistryStore, url: str, local: LocalStore
) -> None:
    keys = [engine_key(builder=str(i)) for i in range(3)]
    keys += [engine_key("sm_90"), engine_key(quant=QuantConfig("int4")), engine_key(model="b")]
    engines = [publish_engine(local, key) for key in keys]
    newest = publish_engine(local, engine_key(builder="9"), format_version=2)
    for engine in (*engines, newest):
        assert remote.push(local, engine) == engine
    local.add_model_name(engines[3], "also / known")
    remote.add_model_name(engines[3], "also / known")
    fresh = opened(url)
    assert fresh.list() == local.list()
    digest = newest.key.model_digest
    for model in ("tiny", digest, "also / known", "also known", "other"):
        for arch in ("cpu", "sm_90"):
            for quant in (INT8, QuantConfig("int4", 64), QuantConfig("int4", 32)):
                for max_format in (0, 1):
                    selector = EngineSelector(model, arch, quant)
                    assert fresh.find(selector, max_format) == local.find(selector, max_format)
    for name in (newest.name, newest.key.digest, newest.key.digest[:16]):
        assert fresh.get(name) == newest
    for name in ("engines/" + "0" * 64, "0" * 5, "../index.json", newest.key.digest.upper()):
        with pytest.raises(EngineNotFound):
            fresh.get(name)


def test_selector_elsewhere_names_the_kv_cache(
    remote: RegistryStore, url: str, local: LocalStore
) -> None:
    """Else whoever asks for bf16 would be given a cache that loses something."""
    quants = [QuantConfig("bf16", kv_cache=kept) for kept in ("", "fp8")]
    engines = [publish_engine(local, engine_key(quant=quant)) for quant in quants]
    for engine in engines:
        remote.push(local, engine)
    for quant, engine in zip(quants, engines, strict=True):
        assert opened(url).find(EngineSelector("tiny", "cpu", quant)) == engine
    asked = EngineSelector("tiny", "cpu", QuantConfig("bf16", kv_cache="int8"))
    assert opened(url).find(asked) is None


def test_pulled_engine_is_the_one_that_was_pushed(
    remote: RegistryStore, url: str, local: LocalStore, other: LocalStore
) -> None:
    engine = publish_engine(local, weights=weight_bytes(BIG_BYTES))
    remote.push(local, engine)
    fresh = opened(url)
    assert pull(fresh, fresh.get(engine.name), other) == engine
    for blob in local.blobs_of(engine):
        assert other.read_all(blob.digest) == local.read_all(blob.digest)
        assert b"".join(fresh.read(blob.digest, 7)) == local.read_all(blob.digest)[7:]
        assert b"".join(fresh.read(blob.digest, blob.size_bytes)) == b""
    with pytest.raises(BlobNotFound):
        b"".join(fresh.read("sha256:" + "0" * 64))


def test_weights_that_two_arches_share_travel_once(
    remote: RegistryStore, local: LocalStore
) -> None:
    cpu, gpu = (publish_engine(local, engine_key(arch)) for arch in ("cpu", "sm_90"))
    remote.push(local, cpu)
    recording = RecordingRegistry(remote.registry)
    RegistryStore(recording).push(local, gpu)
    layers = {blob.digest for blob in gpu.layers}
    assert not layers & set(recording.uploads)
    assert len(recording.uploads) == 1  # the configuration alone
    RegistryStore(recording).push(local, gpu)
    assert len(recording.uploads) == 1


def test_first_push_of_a_key_wins(
    remote: RegistryStore, url: str, local: LocalStore, other: LocalStore
) -> None:
    first = publish_engine(local, weights=weight_bytes(100, seed=1))
    second = publish_engine(other, weights=weight_bytes(100, seed=2))
    remote.push(local, first)
    assert opened(url).push(other, second).manifest == first.manifest
    assert opened(url).list() == (first,)


def test_engine_that_is_pushed_while_blobs_of_another_are_sent_stays(
    remote: RegistryStore, url: str, local: LocalStore, other: LocalStore
) -> None:
    first = publish_engine(local, weights=weight_bytes(100, seed=1))
    second = publish_engine(other, weights=weight_bytes(100, seed=2))
    pushed = []

    def push_the_first(_: int, __: int) -> None:
        if not pushed:
            pushed.append(opened(url).push(local, first))

    assert remote.push(other, second, push_the_first).manifest == first.manifest
    assert pushed
    assert opened(url).list() == (first,)


def test_engine_that_lost_a_blob_is_repaired_by_a_push(
    s3_url: str, local: LocalStore, other: LocalStore
) -> None:
    remote = opened(s3_url)
    engine = publish_engine(local)
    remote.push(local, engine)
    _, hexadecimal = engine.layers[1].digest.split(":")
    assert isinstance(remote.registry, S3Registry)
    obstore.delete(remote.registry._objects, f"blobs/sha256/{hexadecimal}")
    with pytest.raises(BlobNotFound):
        pull(remote, engine, other)
    remote.push(local, engine)
    assert pull(remote, engine, other) == engine


def test_many_that_push_at_once_lose_no_engine(
    remote: RegistryStore, url: str, local: LocalStore
) -> None:
    engines = [publish_engine(local, engine_key(builder=str(i))) for i in range(6)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda engine: opened(url).push(local, engine), engines))
    fresh = opened(url)
    assert {engine.name for engine in fresh.list()} == {engine.name for engine in engines}
    found = fresh.find(EngineSelector("tiny", "cpu", INT8))
    assert found is not None


def test_deleted_engine_is_gone_and_the_others_stay(
    remote: RegistryStore, url: str, local: LocalStore, other: LocalStore
) -> None:
    old, new = (publish_engine(local, engine_key(builder=str(i))) for i in range(2))
    for engine in (old, new):
        remote.push(local, engine)
    remote.add_signature(new, Signature(b"k" * 32, b"s" * 64))
    assert remote.delete(new.name).manifest == new.manifest
    for store in (remote, opened(url)):
        assert store.list() == (old,)
        assert store.find(EngineSelector("tiny", "cpu", INT8)) == old
        with pytest.raises(EngineNotFound):
            store.get(new.name)
    assert pull(opened(url), old, other) == old


def test_signatures_travel_with_their_engine(
    remote: RegistryStore, url: str, local: LocalStore, other: LocalStore
) -> None:
    one, two = (Signature(bytes([i]) * 32, b"s" * 64) for i in range(2))
    engine = local.add_signature(publish_engine(local), one)
    assert remote.push(local, engine).signatures == (one,)
    later = opened(url).add_signature(engine, two)
    assert later.signatures == (one, two)
    assert opened(url).add_signature(engine, two).signatures == (one, two)
    fresh = opened(url)
    assert set(pull(fresh, fresh.get(engine.name), other).signatures) == {one, two}


def test_what_other_tools_say_of_an_engine_stays_and_nonsense_hides_nothing(
    remote: RegistryStore, url: str, local: LocalStore
) -> None:
    """The referrers tag belongs to whoever refers to the engine: an SBOM, another tool's signature."""
    engine = remote.push(local, publish_engine(local))
    registry, tag = remote.registry, referrers_ref(engine.manifest)
    empty = oci.descriptor(EMPTY)
    registry.upload(EMPTY, EMPTY_CONTENT)
    manifest = {"schemaVersion": 2, "mediaType": oci.MANIFEST_TYPE, "config": empty, "layers": []}
    artifact = registry.put_manifest(canonical_json(manifest), oci.MANIFEST_TYPE)
    theirs = {**oci.descriptor(artifact), "artifactType": "application/spdx+json"}
    kinds = (SIGNATURE_TYPE, TUNING_ARTIFACT_TYPE)
    nonsense = [{**oci.descriptor(artifact), "artifactType": kind} for kind in kinds]
    index = {"schemaVersion": 2, "mediaType": oci.INDEX_TYPE, "manifests": [theirs, *nonsense]}
    registry.put_manifest(canonical_json(index), oci.INDEX_TYPE, tag)
    assert opened(url).list() == (engine,)
    signature = Signature(b"k" * 32, b"s" * 64)
    assert opened(url).add_signature(engine, signature).signatures == (signature,)
    opened(url).add_tuning(engine, GPU, record_bytes(engine))
    found = opened(url).registry.manifest(tag)
    assert found is not None
    assert theirs in json.loads(found[1])["manifests"]


def test_image_that_has_an_engines_tag_hides_no_other_and_a_push_mends_it(
    remote: RegistryStore, url: str, local: LocalStore, other: LocalStore
) -> None:
    """Whoever may push may push anything under any tag."""
    good = remote.push(local, publish_engine(local, engine_key(builder="good")))
    bad = publish_engine(local, engine_key(builder="bad"))
    remote.registry.upload(EMPTY, EMPTY_CONTENT)
    empty = oci.descriptor(EMPTY)
    image = {"schemaVersion": 2, "mediaType": oci.MANIFEST_TYPE, "config": empty, "layers": []}
    remote.registry.put_manifest(canonical_json(image), oci.MANIFEST_TYPE, bad.key.digest)
    fresh = opened(url)
    with structlog.testing.capture_logs() as logs:
        assert fresh.list() == fresh.list() == (good,)
    told = [line["record"] for line in logs if line["event"] == "store_record_passed_over"]
    assert told == [f"{fresh.url} {bad.key.digest}"], "once, and by its name"
    assert fresh.find(EngineSelector("tiny", "cpu", INT8)) == good
    assert pull(fresh, fresh.push(local, bad), other).key == bad.key
    assert {engine.name for engine in opened(url).list()} == {good.name, bad.name}
    assert fresh.delete(good.name).name == good.name


def test_index_that_makes_no_sense_hides_no_engine(
    remote: RegistryStore, url: str, local: LocalStore
) -> None:
    engine = remote.push(local, publish_engine(local))
    tag = oci.index_ref(engine.key.model_digest, engine.key.quant)
    found = remote.registry.manifest(tag)
    assert found is not None
    broken = json.loads(found[1])
    broken["manifests"][0]["annotations"][oci.CREATED] = "yesterday"
    remote.registry.put_manifest(
        canonical_json(broken), oci.INDEX_TYPE, tag, replaces=found[0].digest
    )
    fresh = opened(url)
    assert [one.key for one in fresh.list()] == [engine.key]
    assert fresh.find(EngineSelector(engine.key.model_digest, "cpu", INT8)) is not None
    fresh.push(local, engine)
    assert opened(url).list() == (engine,)


def test_blob_of_other_bytes_is_refused(
    url: str,
    remote: RegistryStore,
    registry_folder: Path,
    local: LocalStore,
    other: LocalStore,
) -> None:
    # Bytes of this test's own: the registry keeps one copy for all of its repositories.
    engine = publish_engine(local, weights=weight_bytes(BIG_BYTES, 99))
    remote.push(local, engine)
    digest = engine.layers[1].digest.removeprefix("sha256:")
    if isinstance(remote.registry, S3Registry):
        obstore.put(remote.registry._objects, f"blobs/sha256/{digest}", b"\0" * BIG_BYTES)
    else:
        blobs = registry_folder / "data/docker/registry/v2/blobs/sha256"
        (blobs / digest[:2] / digest / "data").write_bytes(b"\0" * BIG_BYTES)
    with pytest.raises(DigestMismatch):
        pull(remote, engine, other)
    assert other.list() == ()
    assert not list((other.root / "partial").iterdir())


def test_tuning_records_travel_with_their_engine(
    remote: RegistryStore, url: str, local: LocalStore, other: LocalStore
) -> None:
    engine = publish_engine(local, engine_key("sm_90"))
    engine = local.add_signature(engine, Signature(b"k" * 32, b"s" * 64))
    engine = local.add_tuning(engine, GPU, record_bytes(engine))
    assert remote.push(local, engine) == engine
    later = opened(url).add_tuning(engine, GPU, record_bytes(engine, choice="c"))
    later = opened(url).add_tuning(later, "Other", record_bytes(engine, "Other"))
    assert [blob.title for blob in later.tunings] == [GPU, "Other"]
    fresh = opened(url)
    pulled = pull(fresh, fresh.get(engine.name), other)
    assert (pulled.tunings, pulled.signatures) == (later.tunings, engine.signatures)
    assert other.read_all(pulled.tunings[0].digest) == record_bytes(engine, choice="c")


def test_tuning_record_that_is_lost_hides_no_engine(
    remote: RegistryStore, url: str, local: LocalStore
) -> None:
    """It may go between two looks of somebody who reads: whoever deletes its engine removes it first."""
    engine, other = (publish_engine(local, engine_key("sm_90", builder=str(n))) for n in range(2))
    for one in (engine, other):
        remote.push(local, one)
    tuned = remote.add_tuning(engine, GPU, record_bytes(engine))
    (artifact,) = remote._referrers(engine.manifest).tunings
    remote.registry.delete_manifest(artifact.digest)
    fresh = opened(url)
    assert set(fresh.list()) == {engine, other}
    assert fresh.get(engine.name) == engine
    again = fresh.add_tuning(engine, GPU, record_bytes(engine, choice="c"))
    assert [blob.title for blob in again.tunings] == [GPU]
    assert again.tunings != tuned.tunings
