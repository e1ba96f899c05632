"""Signatures and tuning records of the engines in a folder.

    signatures/<key digest>/        descriptors of the artifacts that sign the engine
    tunings/<key digest>/<GPU>      descriptor of the artifact that holds what was measured on a GPU of this name

One whose artifact is lost or makes no sense signs and tells nothing.
"""

import contextlib
import hashlib
import os
import shutil
from pathlib import Path

from shared.engine import TUNING_TYPE, Blob, EngineManifest, Signature, canonical_json
from shared.errors import BlobNotFound, DigestMismatch
from shared.store import oci
from shared.store.blobs import BlobFolder
from shared.store.durable import sync_folder, written_file
from shared.store.records import Records
from shared.store.referrers import (
    EMPTY,
    EMPTY_CONTENT,
    Referrers,
    signature_json,
    signature_of,
    tuning_json,
    tuning_of,
)


class LocalReferrers:
    """What refers to engines, by the digests of their keys.

    Who adds holds the store's lock on names, and a pin.
    """

    def __init__(self, root: Path, blobs: BlobFolder, records: Records) -> None:
        self._blobs, self._records = blobs, records
        self._signatures, self._tunings = root / "signatures", root / "tunings"
        for folder in (self._signatures, self._tunings):
            folder.mkdir(exist_ok=True)

    def add_signature(self, engine: EngineManifest, signature: Signature) -> None:
        """Keeps a signature with the engine."""
        content = signature_json(signature, engine.manifest)
        name = hashlib.sha256(content).hexdigest()
        self._add(self._signatures / engine.key.digest / name, content)

    def add_tuning(self, engine: EngineManifest, gpu: str, record: bytes) -> None:
        """Keeps a GPU's tuning record with the engine, in the place of an older one."""
        blob = self._blobs.write([record], TUNING_TYPE, gpu)
        name = hashlib.sha256(gpu.encode()).hexdigest()
        self._add(self._tunings / engine.key.digest / name, tuning_json(blob, engine.manifest))

    def remove(self, name: str) -> None:
        """Forgets what refers to an engine."""
        for folder in (self._signatures, self._tunings):
            shutil.rmtree(folder / name, ignore_errors=True)

    def of(self, name: str) -> Referrers:
        """Manifests of the artifacts that refer to an engine."""
        signatures, tunings = (
            tuple(
                blob
                for path in (sorted(folder.iterdir()) if folder.exists() else ())
                if (blob := self._records.read(path, oci.descriptor_in)) is not None
            )
            for folder in (self._signatures / name, self._tunings / name)
        )
        return Referrers(signatures, tunings)

    def signatures_of(self, name: str) -> tuple[Signature, ...]:
        """The signatures of an engine."""
        found = []
        for blob in self.of(name).signatures:
            with contextlib.suppress(BlobNotFound, DigestMismatch):
                if (signature := signature_of(self._blobs.read_all(blob.digest))) is not None:
                    found.append(signature)
        return tuple(found)

    def tunings_of(self, name: str) -> tuple[Blob, ...]:
        """The tuning records of an engine, by GPU."""
        found = []
        for blob in self.of(name).tunings:
            with contextlib.suppress(BlobNotFound, DigestMismatch):
                record = tuning_of(self._blobs.read_all(blob.digest))
                if record is not None and self._blobs.has(record):
                    found.append(record)
        return tuple(sorted(found, key=lambda record: record.title))

    def digests_in_sweep(self, name: str) -> set[str]:
        """Every blob that what refers to an engine needs, read as a sweep has to."""
        referrers = self.of(name)
        kept = {blob.digest for blob in (*referrers.signatures, *referrers.tunings)}
        for blob in referrers.tunings:
            with contextlib.suppress(BlobNotFound, DigestMismatch):
                measured = tuning_of(self._blobs.read_in_sweep(blob.digest))
                kept |= set() if measured is None else {measured.digest}
        return kept | {EMPTY.digest} if kept else kept

    def _add(self, path: Path, content: bytes) -> None:
        self._blobs.write([EMPTY_CONTENT], EMPTY.media_type)
        manifest = self._blobs.write([content], oci.MANIFEST_TYPE)
        path.parent.mkdir(exist_ok=True)
        descriptor = canonical_json(oci.descriptor(manifest))
        os.replace(written_file(self._blobs.partial, descriptor), path)
        sync_folder(path.parent)
