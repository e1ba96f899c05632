"""Signed engines: who is believed, and that signatures stay with their engine."""

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from shared.engine import EngineManifest, Signature
from shared.errors import EngineNotTrusted
from shared.settings import SettingsError
from shared.signing import TrustedKeys, is_signature_of, signed_bytes
from shared.store import LocalStore, oci, pull
from shared.store.referrers import referrers_ref
from tests.runtime_service.daemon import publish_echo

KEY, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in (1, 2))


def signature(key: Ed25519PrivateKey, engine: EngineManifest) -> Signature:
    """What the owner of `key` says of `engine`."""
    signed = key.sign(signed_bytes(engine.manifest.digest))
    return Signature(key.public_key().public_bytes_raw(), signed)


def key_file(path: Path, *keys: Ed25519PrivateKey | ec.EllipticCurvePrivateKey) -> Path:
    """A file of their public keys."""
    pem, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    path.write_bytes(b"".join(key.public_key().public_bytes(pem, form) for key in keys))
    return path


def test_engine_is_trusted_where_one_of_its_signers_is(store: LocalStore, tmp_path: Path) -> None:
    engine, another = publish_echo(store), publish_echo(store, "another")
    trusted = TrustedKeys.load(key_file(tmp_path / "keys", KEY))
    both = TrustedKeys.load(key_file(tmp_path / "both", OTHER, KEY))
    mine, others = signature(KEY, engine), signature(OTHER, engine)
    trusted.check(replace(engine, signatures=(others, mine)))
    both.check(replace(engine, signatures=(mine,)))
    both.check(replace(engine, signatures=(others,)))
    forged = Signature(mine.public_key, bytes(64))
    for signatures, problem in (
        ((), "is not signed"),
        ((others,), "only keys that are not trusted signed it"),
        ((signature(KEY, another),), "is not one of this engine"),
        ((forged,), "is not one of this engine"),
        ((Signature(others.public_key, mine.signature),), "not trusted"),
    ):
        with pytest.raises(EngineNotTrusted, match=problem) as failed:
            trusted.check(replace(engine, signatures=signatures))
        assert "millrace sign" in str(failed.value)


def test_nonsense_is_no_signature(store: LocalStore) -> None:
    digest = publish_echo(store).manifest.digest
    for nonsense in (Signature(b"", b""), Signature(bytes(32), bytes(64)), Signature(b"x", b"y")):
        assert not is_signature_of(nonsense, digest)


def test_file_without_ed25519_keys_stops_a_start(tmp_path: Path) -> None:
    wrong = key_file(tmp_path / "ec", ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(SettingsError, match="not Ed25519"):
        TrustedKeys.load(wrong)
    (tmp_path / "empty").write_text("")
    with pytest.raises(SettingsError, match="no public key"):
        TrustedKeys.load(tmp_path / "empty")
    broken = "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"
    (tmp_path / "broken").write_text(broken)
    with pytest.raises(SettingsError, match="broken public key"):
        TrustedKeys.load(tmp_path / "broken")
    with pytest.raises(SettingsError, match="cannot read"):
        TrustedKeys.load(tmp_path / "none")


def test_signature_is_an_artifact_that_refers_to_its_engine(store: LocalStore) -> None:
    """An OCI artifact with `subject`, found by the referrers tag; added twice it is there once."""
    engine = publish_echo(store)
    signed = store.add_signature(engine, signature(KEY, engine))
    assert store.add_signature(engine, signature(KEY, engine)) == signed
    assert signed.signatures == (signature(KEY, engine),)
    assert store.get(engine.name) == signed
    refs = {
        row["annotations"][oci.REF_NAME]: row["digest"]
        for row in json.loads((store.root / "index.json").read_bytes())["manifests"]
    }
    referrers = json.loads(store.read_all(refs[engine.manifest.digest.replace(":", "-")]))
    (row,) = referrers["manifests"]
    assert row["artifactType"] == "application/vnd.millrace.signature.v1"
    manifest = json.loads(store.read_all(row["digest"]))
    assert manifest["subject"]["digest"] == engine.manifest.digest
    assert manifest["artifactType"] == "application/vnd.millrace.signature.v1"
    assert [layer["size"] for layer in manifest["layers"]] == [2]


def test_signatures_survive_sweeps_and_go_with_their_engine(store: LocalStore) -> None:
    engine, other = publish_echo(store), publish_echo(store, "other")
    store.add_signature(engine, signature(KEY, engine))
    store.add_signature(other, signature(KEY, other))
    store.sweep(grace_s=-1)
    assert store.get(engine.name).signatures
    blobs = {path.name for path in (store.root / "blobs/sha256").iterdir()}
    store.delete(engine.name)
    store.sweep(grace_s=-1)
    gone = blobs - {path.name for path in (store.root / "blobs/sha256").iterdir()}
    assert len(gone) >= 2
    assert store.get(other.name).signatures == (signature(KEY, other),)
    assert publish_echo(store).signatures == ()


def test_pull_brings_signatures_along(store: LocalStore, tmp_path: Path) -> None:
    engine = publish_echo(store)
    local = LocalStore(tmp_path / "local")
    assert pull(store, store.get(engine.name), local).signatures == ()
    signed = store.add_signature(engine, signature(KEY, engine))
    pulled = pull(store, signed, local)
    assert pulled.signatures == signed.signatures
    assert local.get(engine.name).signatures == signed.signatures


@pytest.mark.skipif(
    shutil.which("skopeo") is None and not os.environ.get("CI"),
    reason="skopeo is not installed (apt-get install skopeo)",
)
def test_skopeo_copies_engines_and_signatures(store: LocalStore, tmp_path: Path) -> None:
    engine = publish_echo(store)
    store.add_signature(engine, signature(KEY, engine))
    for ref in (engine.key.digest, referrers_ref(engine.manifest)):
        done = subprocess.run(
            ["skopeo", "--insecure-policy", "copy", "--all", f"oci:{store.root}:{ref}",
             f"oci:{tmp_path / 'copy'}:{ref}"],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    copied = {path.name for path in (tmp_path / "copy/blobs/sha256").iterdir()}
    assert engine.manifest.digest.removeprefix("sha256:") in copied
    (signed,) = (store.root / "signatures" / engine.key.digest).iterdir()
    assert signed.name in copied
