"""What refers to an engine, as OCI documents: signatures, and what was measured on a GPU; pure.

Each is an artifact of its own, whose manifest names the engine's as its `subject`. So it comes and goes without a
change of the engine, and any registry carries it.

Source: OCI image-spec 1.1, "Guidelines for Artifact Usage"; distribution-spec 1.1, "Referrers Tag Schema".
"""

import base64
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from shared.engine import Blob, Signature, canonical_json
from shared.errors import InvalidField
from shared.store import oci

SIGNATURE_TYPE = "application/vnd.millrace.signature.v1"
TUNING_ARTIFACT_TYPE = "application/vnd.millrace.tuning.v1"
EMPTY_CONTENT = b"{}"
EMPTY = Blob(
    "application/vnd.oci.empty.v1+json",
    f"sha256:{hashlib.sha256(EMPTY_CONTENT).hexdigest()}",
    len(EMPTY_CONTENT),
)
PUBLIC_KEY = "vnd.millrace.signature.public-key"
SIGNATURE = "vnd.millrace.signature.ed25519"


def signature_json(signature: Signature, subject: Blob) -> bytes:
    """The manifest of a signature's artifact, which refers to the manifest that is signed."""
    encoded = {
        PUBLIC_KEY: base64.b64encode(signature.public_key).decode(),
        SIGNATURE: base64.b64encode(signature.signature).decode(),
    }
    return _referrer_json(SIGNATURE_TYPE, EMPTY, subject, {"annotations": encoded})


def tuning_json(record: Blob, subject: Blob) -> bytes:
    """The manifest of a tuning record's artifact, which refers to the manifest of the engine that was measured."""
    return _referrer_json(TUNING_ARTIFACT_TYPE, record, subject, {})


def _referrer_json(
    artifact_type: str, layer: Blob, subject: Blob, more: dict[str, dict[str, str]]
) -> bytes:
    return canonical_json(
        {
            "schemaVersion": 2,
            "mediaType": oci.MANIFEST_TYPE,
            "artifactType": artifact_type,
            "config": oci.descriptor(EMPTY),
            "layers": [oci.descriptor(layer)],
            "subject": oci.descriptor(subject),
            **more,
        }
    )


def signature_of(manifest_text: bytes) -> Signature | None:
    """The signature in an artifact that `signature_json` wrote; None where there is no sense in it."""
    try:
        annotations = json.loads(manifest_text)["annotations"]
        key, signature = (base64.b64decode(annotations[name]) for name in (PUBLIC_KEY, SIGNATURE))
    except (ValueError, KeyError, TypeError):  # whoever may write to the store may write this
        return None
    return Signature(key, signature)


def tuning_of(manifest_text: bytes) -> Blob | None:
    """The record in an artifact that `tuning_json` wrote; None where there is no sense in it."""
    try:
        return oci.blob_of(json.loads(manifest_text)["layers"][0])
    except (ValueError, LookupError, TypeError, AttributeError, InvalidField):
        return None


@dataclass(frozen=True, slots=True)
class Referrers:
    """Manifests of the artifacts that refer to one engine.

    Args:
        others: rows of an index that other tools wrote, JSON each: theirs to keep.
    """

    signatures: tuple[Blob, ...] = ()
    tunings: tuple[Blob, ...] = ()
    others: tuple[bytes, ...] = ()


def referrers_json(referrers: Referrers) -> bytes:
    """Their index, as registries without a referrers API keep it."""
    kinds = {SIGNATURE_TYPE: referrers.signatures, TUNING_ARTIFACT_TYPE: referrers.tunings}
    ours = [
        {**oci.descriptor(blob), "artifactType": kind}
        for kind, blobs in kinds.items()
        for blob in blobs
    ]
    return oci.image_index([*ours, *map(json.loads, referrers.others)])


def referrers_of(index_text: bytes) -> Referrers:
    """What an index lists that `referrers_json` wrote, or another tool; artifacts of other kinds are others'."""
    rows: dict[str, list[dict[str, Any]]] = {SIGNATURE_TYPE: [], TUNING_ARTIFACT_TYPE: [], "": []}
    for raw in json.loads(index_text)["manifests"]:
        rows[raw.get("artifactType", "") if raw.get("artifactType") in rows else ""].append(raw)
    signatures, tunings = (
        tuple(map(oci.blob_of, rows[kind])) for kind in (SIGNATURE_TYPE, TUNING_ARTIFACT_TYPE)
    )
    return Referrers(signatures, tunings, tuple(map(canonical_json, rows[""])))


def referrers_ref(subject: Blob) -> str:
    """Under which reference that index is found: the digest, as a tag."""
    return subject.digest.replace(":", "-")
