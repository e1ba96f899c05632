"""Engines as OCI documents: image configuration, image manifest, image index; pure.

An engine is a valid OCI image manifest, so that any registry and tool can carry and show it. Its
configuration is an image configuration whose labels hold our data; the kind is in `artifactType`.
Nothing here knows a clock or a path: equal drafts give equal bytes.

Source: OCI image-spec 1.1: manifest.md, config.md, image-index.md, annotations.md.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from shared.engine import (
    ARTIFACT_TYPE,
    Blob,
    EngineDraft,
    EngineKey,
    EngineManifest,
    QuantConfig,
    canonical_json,
    is_digest,
)
from shared.errors import InvalidField

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
CREATED = "org.opencontainers.image.created"
LAYOUT = {"imageLayoutVersion": "1.0.0"}

TITLE = "org.opencontainers.image.title"
MAX_REF_CHARACTERS = 128
REF_NAME = "org.opencontainers.image.ref.name"
KEY_LABEL = "millrace.engine.key"
MODEL_LABEL = "millrace.engine.model"
FORMAT_LABEL = "millrace.engine.format-version"


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """An engine as an index lists it.

    Args:
        model: the name that the index is for; "" where the index does not say.
        created_s: Unix time of publication; 0 where the index does not say.
    """

    manifest: Blob
    arch: str
    model: str
    created_s: float


def platform_of(arch: str) -> dict[str, str]:
    """The OCI platform of engines for `arch`.

    OCI asks for a CPU and an operating system. Engines depend on neither, so all of them name the
    commonest, and tools find them by variant.
    """
    return {"architecture": "amd64", "os": "linux", "variant": arch}


def config_json(draft: EngineDraft) -> bytes:
    """The image configuration of an engine: its platform, and our data as labels."""
    labels = {
        **draft.labels,
        KEY_LABEL: canonical_json(draft.key.to_dict()).decode(),
        MODEL_LABEL: draft.model,
        FORMAT_LABEL: str(draft.format_version),
    }
    return canonical_json(
        {
            **platform_of(draft.key.arch),
            "config": {"Labels": labels},
            "rootfs": {"type": "layers", "diff_ids": [blob.digest for blob in draft.layers]},
        }
    )


def manifest_json(draft: EngineDraft, config: Blob) -> bytes:
    """The image manifest of an engine whose configuration is the blob `config`."""
    return canonical_json(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "artifactType": ARTIFACT_TYPE,
            "config": descriptor(config),
            "layers": [descriptor(blob) for blob in draft.layers],
        }
    )


def descriptor(blob: Blob) -> dict[str, Any]:
    """`blob` as an OCI content descriptor."""
    base = {"mediaType": blob.media_type, "digest": blob.digest, "size": blob.size_bytes}
    return {**base, "annotations": {TITLE: blob.title}} if blob.title else base


def blob_of(raw: dict[str, Any]) -> Blob:
    """The blob that an OCI content descriptor names."""
    digest, size, title = raw["digest"], raw["size"], raw.get("annotations", {}).get(TITLE, "")
    if not is_digest(digest) or not isinstance(size, int) or size < 0:
        raise InvalidField(field="manifest", problem=f"{raw!r} is not a content descriptor")
    # A title may become a file name where an engine is loaded.
    if title.startswith("/") or ".." in title.split("/"):
        raise InvalidField(field="manifest", problem=f"title {title!r} leaves the engine")
    return Blob(str(raw["mediaType"]), digest, size, title)


def descriptor_in(text: bytes) -> Blob:
    """The blob that a content descriptor in JSON names; raises what reading and `blob_of` raise."""
    return blob_of(json.loads(text))


def config_of(manifest_text: bytes) -> Blob:
    """The configuration that an engine's manifest names.

    Raises:
        InvalidField: it is not an engine's manifest.
    """
    try:
        raw = json.loads(manifest_text)
        if raw["artifactType"] != ARTIFACT_TYPE:
            raise InvalidField(field="manifest", problem=f"its artifactType is not {ARTIFACT_TYPE}")
        return blob_of(raw["config"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidField(field="manifest", problem=f"not an engine's: {error!r}") from error


def layers_of(manifest_text: bytes) -> tuple[Blob, ...]:
    """The layers that an engine's manifest names.

    Raises:
        InvalidField: it is not an engine's manifest.
    """
    try:
        return tuple(blob_of(raw) for raw in json.loads(manifest_text)["layers"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidField(field="manifest", problem=f"not an engine's: {error!r}") from error


def engine_of(
    manifest: Blob, manifest_text: bytes, config_text: bytes, created_s: float
) -> EngineManifest:
    """The engine that a manifest and its configuration describe.

    Raises:
        InvalidField: they are not an engine's.
    """
    try:
        labels = json.loads(config_text)["config"]["Labels"]
        return EngineManifest(
            key=EngineKey.from_dict(json.loads(labels[KEY_LABEL])),
            model=labels[MODEL_LABEL],
            format_version=int(labels[FORMAT_LABEL]),
            layers=layers_of(manifest_text),
            manifest=manifest,
            created_s=created_s,
        )
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise InvalidField(field="manifest", problem=f"not an engine's: {error!r}") from error


def index_json(engines: Iterable[EngineManifest]) -> bytes:
    """The image index of one model's engines over several archs."""
    return image_index(
        {**descriptor(engine.manifest), "platform": platform_of(engine.key.arch)}
        for engine in sorted(engines, key=lambda engine: engine.key.arch)
    )


def named_index_json(entries: Iterable[IndexEntry]) -> bytes:
    """The image index of all engines of one model name and quantization, newest first."""
    ordered = sorted(entries, key=lambda e: (e.created_s, e.manifest.digest), reverse=True)
    return image_index(
        {
            **descriptor(entry.manifest),
            "platform": platform_of(entry.arch),
            "annotations": {CREATED: _rfc3339(entry.created_s), MODEL_LABEL: entry.model},
        }
        for entry in ordered
    )


def entries_of(index_text: bytes) -> tuple[IndexEntry, ...]:
    """What an image index lists; one that another tool wrote says no time and no model name.

    Raises:
        InvalidField: it is not an image index.
    """
    try:
        return tuple(
            IndexEntry(
                manifest=blob_of(raw),
                arch=str(raw.get("platform", {}).get("variant", "")),
                model=raw.get("annotations", {}).get(MODEL_LABEL, ""),
                created_s=_unix_s(raw.get("annotations", {}).get(CREATED, "")),
            )
            for raw in json.loads(index_text)["manifests"]
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidField(field="index", problem=f"not an image index: {error!r}") from error


def tags_in_layout(text: bytes) -> dict[str, Blob]:
    """What each reference of an image layout's `index.json` names; others may list what has none.

    Raises:
        InvalidField: it is not one.
    """
    try:
        rows = json.loads(text)["manifests"]
        return {
            raw["annotations"][REF_NAME]: blob_of(raw)
            for raw in rows
            if REF_NAME in raw.get("annotations", {})
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidField(field="index.json", problem=f"not a layout's: {error!r}") from error


def blob_from(content: bytes, media_type: str) -> Blob:
    """The descriptor of bytes at hand."""
    return Blob(media_type, f"sha256:{hashlib.sha256(content).hexdigest()}", len(content))


def _rfc3339(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).isoformat(timespec="microseconds")


def _unix_s(text: str) -> float:
    return round(datetime.fromisoformat(text).timestamp(), 6) if text else 0.0


def layout_index_json(refs: Iterable[tuple[str, Blob]]) -> bytes:
    """The `index.json` of an image layout: every reference and what it names."""
    return image_index({**descriptor(blob), "annotations": {REF_NAME: name}} for name, blob in refs)


def digests_in_index(text: bytes) -> set[str]:
    """The digests that an image index names."""
    return {blob_of(raw).digest for raw in json.loads(text)["manifests"]}


def image_index(manifests: Iterable[dict[str, Any]]) -> bytes:
    """An image index of these rows, content descriptors with what is said of each."""
    return canonical_json(
        {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": list(manifests)}
    )


def group_by_index(engines: Iterable[EngineManifest]) -> dict[str, list[EngineManifest]]:
    """What shares an index, by the index's reference, `model-quant`.

    Args:
        engines: newest first; an index holds the newest engine of each arch.
    """
    groups: dict[tuple[str, str], dict[str, EngineManifest]] = {}
    for engine in engines:
        group = groups.setdefault((engine.key.model_digest, str(engine.key.quant)), {})
        group.setdefault(engine.key.arch, engine)
    named: dict[str, list[EngineManifest]] = {}
    for (model_digest, quant), by_arch in groups.items():
        newest = next(iter(by_arch.values()))
        ref = _ref_name(f"{newest.model}-{quant}")
        if ref in named:  # another checkpoint of that name
            ref = f"{ref}-{model_digest[:12]}"
        named[ref] = list(by_arch.values())
    return named


def index_ref(model: str, quant: QuantConfig) -> str:
    """Under which reference a registry keeps the index of a model's name and a quantization."""
    resolved = quant.resolved
    found_by = QuantConfig(resolved.scheme, resolved.group_size, kv_cache=resolved.kv_cache)
    ref = _ref_name(f"{model}-{found_by}")
    if len(ref) <= MAX_REF_CHARACTERS:
        return ref
    return f"{ref[: MAX_REF_CHARACTERS - 17]}-{hashlib.sha256(ref.encode()).hexdigest()[:16]}"


def _ref_name(text: str) -> str:
    # What every tool takes: runs of letters and digits joined by single separators.
    return "-".join(re.findall(r"[A-Za-z0-9]+(?:[._][A-Za-z0-9]+)*", text))
