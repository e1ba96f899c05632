"""Tuning records: what is read as one, and that they stay with their engine, one for each GPU."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.engine import EngineManifest
from shared.errors import TuningRefused
from shared.store import LocalStore, oci, pull
from shared.store.referrers import referrers_ref
from shared.tuning import (
    MAX_TUNING_BYTES,
    TunedSite,
    TuningRecord,
    is_gpu_name,
    record_from_json,
    record_to_json,
)
from tests.shared.engines import engine_key, publish_engine
from tests.shared.tunings import GPU, record_bytes, record_of

_TEXT = st.text(max_size=20)
_WHOLE = st.integers(0, 1 << 31)
_US = st.floats(0, 1e9, allow_nan=False)
_SITES = st.builds(
    TunedSite, op=_TEXT, tokens=_WHOLE, sequences=_WHOLE, n=_WHOLE, k=_WHOLE, dtype=_TEXT,
    layout=_TEXT, rides=_TEXT, built_in=_TEXT, built_in_us=_US, choice=_TEXT, choice_us=_US,
)  # fmt: skip
_RECORDS = st.builds(
    TuningRecord, gpu=_TEXT, arch=_TEXT, engine=_TEXT, builder=_TEXT, measured_at=_TEXT,
    measured_by=_TEXT, sites=st.lists(_SITES, max_size=5).map(tuple),
)  # fmt: skip


@pytest.fixture
def engine(store: LocalStore) -> EngineManifest:
    """An engine in it."""
    return publish_engine(store, engine_key("sm_90"))


@given(record=_RECORDS)
def test_every_record_is_read_as_it_was_written(record: TuningRecord) -> None:
    text = record_to_json(record)
    assert record_from_json(text, gpu=record.gpu, engine=record.engine) == record


@given(junk=st.binary(max_size=200))
def test_nonsense_is_refused_in_one_line(junk: bytes) -> None:
    with pytest.raises(TuningRefused) as refused:
        record_from_json(junk, gpu=GPU, engine="sha256:0")
    assert "\n" not in str(refused.value)
    assert "millrace tune" in str(refused.value)


def test_records_of_others_and_of_another_form_are_refused(
    store: LocalStore, engine: EngineManifest
) -> None:
    text, digest = record_bytes(engine), engine.manifest.digest
    raw = json.loads(text)
    another = publish_engine(store, engine_key("sm_90", "b"))
    for gpu, manifest, content, problem in (
        ("NVIDIA Other", digest, text, f"measured on '{GPU}'"),
        (GPU, another.manifest.digest, text, "with the engine of manifest"),
        (GPU, digest, text[:-1], "malformed"),
        (GPU, digest, json.dumps({**raw, "format": 2}).encode(), "malformed"),
        (GPU, digest, json.dumps({**raw, "more": 1}).encode(), "malformed"),
        (GPU, digest, json.dumps({**raw, "sites": [{"op": "linear"}]}).encode(), "malformed"),
        (GPU, digest, b" " * (MAX_TUNING_BYTES + 1), "at most"),
    ):
        with pytest.raises(TuningRefused, match=problem):
            record_from_json(content, gpu=gpu, engine=manifest)
    assert record_from_json(text, gpu=GPU, engine=digest) == record_of(engine)


def test_names_that_could_leave_a_folder_are_no_gpus() -> None:
    assert is_gpu_name(GPU)
    for name in ("", "/etc/passwd", "a/../b", "..", "a\nb", "x" * 129):
        assert not is_gpu_name(name)


def test_record_is_an_artifact_that_refers_to_its_engine(
    store: LocalStore, engine: EngineManifest
) -> None:
    tuned = store.add_tuning(engine, GPU, record_bytes(engine))
    (record,) = tuned.tunings
    assert record.title == GPU
    assert store.read_all(record.digest) == record_bytes(engine)
    assert store.get(engine.name) == tuned
    refs = {
        row["annotations"][oci.REF_NAME]: row["digest"]
        for row in json.loads((store.root / "index.json").read_bytes())["manifests"]
    }
    referrers = json.loads(store.read_all(refs[referrers_ref(engine.manifest)]))
    (row,) = referrers["manifests"]
    assert row["artifactType"] == "application/vnd.millrace.tuning.v1"
    manifest = json.loads(store.read_all(row["digest"]))
    assert manifest["subject"]["digest"] == engine.manifest.digest
    assert manifest["layers"][0]["digest"] == record.digest


def test_newest_record_of_a_gpu_takes_the_place_of_the_older(
    store: LocalStore, engine: EngineManifest
) -> None:
    store.add_tuning(engine, GPU, record_bytes(engine))
    store.add_tuning(engine, "NVIDIA Other", record_bytes(engine, "NVIDIA Other"))
    tuned = store.add_tuning(engine, GPU, record_bytes(engine, choice="c"))
    assert [blob.title for blob in tuned.tunings] == ["NVIDIA Other", GPU]
    assert store.read_all(tuned.tunings[1].digest) == record_bytes(engine, choice="c")


def test_records_survive_sweeps_and_go_with_their_engine(
    store: LocalStore, engine: EngineManifest
) -> None:
    store.add_tuning(engine, GPU, record_bytes(engine))
    (old,) = store.get(engine.name).tunings
    (new,) = store.add_tuning(engine, GPU, record_bytes(engine, choice="c")).tunings
    store.sweep(grace_s=-1)
    assert store.get(engine.name).tunings == (new,)
    blobs = {path.name for path in (store.root / "blobs/sha256").iterdir()}
    assert new.digest.removeprefix("sha256:") in blobs
    assert old.digest.removeprefix("sha256:") not in blobs
    store.delete(engine.name)
    store.sweep(grace_s=-1)
    left = {path.name for path in (store.root / "blobs/sha256").iterdir()}
    assert new.digest.removeprefix("sha256:") not in left
    assert publish_engine(store, engine_key("sm_90")).tunings == ()


def test_pull_brings_records_along(
    store: LocalStore, engine: EngineManifest, tmp_path: Path
) -> None:
    tuned = store.add_tuning(engine, GPU, record_bytes(engine))
    local = LocalStore(tmp_path / "local")
    assert pull(store, tuned, local).tunings == tuned.tunings
    assert local.read_all(tuned.tunings[0].digest) == record_bytes(engine)


def test_lost_record_leaves_the_engine(store: LocalStore, engine: EngineManifest) -> None:
    """Nothing that is only faster may cost what is served."""
    (record,) = store.add_tuning(engine, GPU, record_bytes(engine)).tunings
    store.blob_path(record.digest).unlink()
    assert store.get(engine.name).tunings == ()
    tuned = LocalStore(store.root).add_tuning(engine, GPU, record_bytes(engine))
    assert tuned.tunings == (record,)
