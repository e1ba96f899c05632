"""The store is an OCI image layout that other tools read and copy."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from shared.engine import EngineManifest, QuantConfig
from shared.errors import InvalidField
from shared.store import LocalStore, oci
from tests.shared.engines import engine_key, publish_engine, weight_bytes

# In CI they fail without it: nobody reads there what was skipped.
skopeo_only = pytest.mark.skipif(
    shutil.which("skopeo") is None and not os.environ.get("CI"),
    reason="skopeo is not installed (apt-get install skopeo)",
)


def skopeo(*arguments: str) -> str:
    run = subprocess.run(["skopeo", *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def read_json(store: LocalStore, digest: str) -> Any:
    return json.loads(store.read_all(digest))


def refs(store: LocalStore) -> dict[str, dict[str, Any]]:
    index = json.loads((store.root / "index.json").read_bytes())
    return {raw["annotations"][oci.REF_NAME]: raw for raw in index["manifests"]}


@pytest.fixture
def engines(store: LocalStore) -> list[EngineManifest]:
    archs = ("cpu", "sm_80", "sm_90")
    return [publish_engine(store, engine_key(arch), graph=arch.encode()) for arch in archs]


def test_engine_is_an_image_manifest(store: LocalStore) -> None:
    engine = publish_engine(store, engine_key("sm_90"))
    manifest = read_json(store, engine.manifest.digest)
    assert manifest["schemaVersion"] == 2
    assert manifest["mediaType"] == engine.manifest.media_type == oci.MANIFEST_TYPE
    assert manifest["artifactType"] == "application/vnd.millrace.engine.v1"
    assert manifest["config"]["mediaType"] == "application/vnd.oci.image.config.v1+json"
    titles = [
        layer["annotations"]["org.opencontainers.image.title"] for layer in manifest["layers"]
    ]
    assert titles == ["graph.json", "weights/00000"]
    config = read_json(store, manifest["config"]["digest"])
    assert (config["os"], config["variant"]) == ("linux", "sm_90")
    assert config["rootfs"]["diff_ids"] == [layer["digest"] for layer in manifest["layers"]]
    assert json.loads(config["config"]["Labels"]["millrace.engine.key"]) == engine.key.to_dict()
    assert "created" not in config


def test_engine_bytes_never_change(store: LocalStore) -> None:
    """Law 3: same key, same bytes, next year too: other values need a new FORMAT_VERSION."""
    assert publish_engine(store).manifest.digest == (
        "sha256:b312bc93a00fb7a2a95a9d2c82cb0699943b3f626ba673935a359d7d5b4d158f"
    )


def test_archs_of_one_model_share_an_index_and_their_weights(
    store: LocalStore, engines: list[EngineManifest]
) -> None:
    assert len({engine.layer("weights/00000").digest for engine in engines}) == 1
    index = read_json(store, refs(store)["tiny-int8"]["digest"])
    assert index["mediaType"] == oci.INDEX_TYPE
    assert {raw["platform"]["variant"]: raw["digest"] for raw in index["manifests"]} == {
        engine.key.arch: engine.manifest.digest for engine in engines
    }


def test_index_holds_the_newest_engine_of_each_arch(store: LocalStore) -> None:
    old = publish_engine(store, engine_key(builder="1"))
    new = publish_engine(store, engine_key(builder="2"))
    gpu = publish_engine(store, engine_key("sm_90", builder="1-kernels"))
    int4 = publish_engine(store, engine_key(builder="2", quant=QuantConfig("int4", 32)))
    namesake = publish_engine(store, engine_key(model="another checkpoint"))
    indexes = {
        ref: oci.digests_in_index(store.read_all(raw["digest"]))
        for ref, raw in refs(store).items()
        if raw["mediaType"] == oci.INDEX_TYPE
    }
    assert indexes == {
        "tiny-int8": {namesake.manifest.digest},
        f"tiny-int8-{new.key.model_digest[:12]}": {new.manifest.digest, gpu.manifest.digest},
        "tiny-int4-rtn-g32": {int4.manifest.digest},
    }
    assert refs(store)[old.key.digest]["digest"] == old.manifest.digest


def test_deleted_engine_leaves_the_index(store: LocalStore, engines: list[EngineManifest]) -> None:
    store.delete(engines[0].name)
    assert engines[0].key.digest not in refs(store)
    index = read_json(store, refs(store)["tiny-int8"]["digest"])
    assert [raw["platform"]["variant"] for raw in index["manifests"]] == ["sm_80", "sm_90"]


@skopeo_only
def test_skopeo_inspects_an_engine(store: LocalStore) -> None:
    engine = publish_engine(store, engine_key("sm_90"), model="org/Model: 1.5b!", graph=b"graph")
    for ref in (engine.key.digest, "org-Model-1.5b-int8"):
        where = f"oci:{store.root}:{ref}"
        shown = json.loads(skopeo("--override-variant", "sm_90", "inspect", where))
        assert shown["Digest"].startswith("sha256:")
        assert shown["Layers"] == [blob.digest for blob in engine.layers]
        assert json.loads(shown["Labels"]["millrace.engine.key"]) == engine.key.to_dict()
        assert shown["Labels"]["millrace.engine.model"] == "org/Model: 1.5b!"
    raw = skopeo("inspect", "--raw", f"oci:{store.root}:{engine.key.digest}")
    assert raw.encode() == store.read_all(engine.manifest.digest)


@skopeo_only
def test_skopeo_copies_an_index_whole(
    store: LocalStore, engines: list[EngineManifest], tmp_path: Path
) -> None:
    """All archs, every digest unchanged, the weights once."""
    copy = tmp_path / "copy"
    skopeo("copy", "--all", f"oci:{store.root}:tiny-int8", f"oci:{copy}:copied")
    (raw,) = json.loads((copy / "index.json").read_bytes())["manifests"]
    assert raw["digest"] == refs(store)["tiny-int8"]["digest"]
    names = {blob.digest for engine in engines for blob in store.blobs_of(engine)}
    names.add(raw["digest"])
    copied = {f"sha256:{path.name}": path for path in (copy / "blobs" / "sha256").iterdir()}
    assert copied.keys() == names
    for digest, path in copied.items():
        assert path.read_bytes() == store.read_all(digest)


@skopeo_only
def test_skopeo_picks_an_engine_by_variant(
    store: LocalStore, engines: list[EngineManifest], tmp_path: Path
) -> None:
    where = f"oci:{tmp_path / 'copy'}:one"
    skopeo("--override-variant", "sm_80", "copy", f"oci:{store.root}:tiny-int8", where)
    assert skopeo("inspect", "--raw", where).encode() == store.read_all(engines[1].manifest.digest)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{}",
        b'{"artifactType":"other"}',
        b'{"artifactType":"application/vnd.millrace.engine.v1","config":{}}',
        b'{"artifactType":"application/vnd.millrace.engine.v1","config":'
        b'{"digest":"sha256:../..","size":1,"mediaType":"x"}}',
    ],
)
def test_foreign_manifest_is_refused(text: bytes) -> None:
    with pytest.raises(InvalidField, match="manifest"):
        oci.config_of(text)


@pytest.mark.parametrize("title", ["/etc/passwd", "../x", "a/../../x"])
def test_title_that_leaves_the_engine_is_refused(title: str) -> None:
    raw = {
        "mediaType": "x",
        "digest": "sha256:" + "0" * 64,
        "size": 1,
        "annotations": {oci.TITLE: title},
    }
    with pytest.raises(InvalidField, match="title"):
        oci.blob_of(raw)


def test_publishing_many_engines_keeps_the_index_true(store: LocalStore) -> None:
    published = [
        publish_engine(store, engine_key(model=str(i)), model=f"m{i}", weights=weight_bytes(9, i))
        for i in range(20)
    ]
    assert {engine.key.digest for engine in published} <= refs(store).keys()
    assert len(refs(store)) == 40


def test_registry_keeps_kinds_of_kv_cache_apart() -> None:
    """An index's reference is what other tools pull by: it must not give another engine than was named."""
    kinds = ("", "fp8", "int8")
    refs = {oci.index_ref("m", QuantConfig("bf16", kv_cache=kind)) for kind in kinds}
    assert refs == {"m-bf16", "m-bf16-kv-fp8", "m-bf16-kv-int8"}
