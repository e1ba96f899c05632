"""A store in a folder: an OCI image layout, with engines by key and by selector beside it.

The name of an engine is the commit point: it is made at once, and only when all of its blobs are
on the disk. Whoever publishes an engine that has a name already adopts the first one. Everything
else (`index.json`, the selectors) follows from the names.

    oci-layout, index.json          the image layout; index.json is a view, made anew at changes
    blobs/ and others               blobs.py
    engines/<key digest>            the engine's manifest descriptor and its time of publication
    selectors/<selector digest>/    a name `<key digest>` for every engine that was named so
    signatures/, tunings/           local_referrers.py
    locks/names                     held while names and index.json change
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from shared.engine import (
    Blob,
    EngineDraft,
    EngineKey,
    EngineManifest,
    EngineSelector,
    Signature,
    canonical_json,
)
from shared.errors import BlobNotFound, DigestMismatch, EngineNotFound, InvalidField
from shared.store import oci
from shared.store.blob_writer import BlobWriter, Bytes
from shared.store.blobs import BlobFolder, Sweep
from shared.store.durable import sync_folder, written_file
from shared.store.local_referrers import LocalReferrers
from shared.store.locks import FileLock
from shared.store.pins import Pin
from shared.store.records import EngineRecord, Records, full_digest
from shared.store.referrers import Referrers, referrers_json, referrers_ref

DEFAULT_GRACE_S = 24 * 3600.0


class LocalStore:
    """An `ArtifactStore` in a folder, which is made if it is missing.

    May be used by several threads and processes at once.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).absolute()
        self._engines = self.root / "engines"
        self._selectors = self.root / "selectors"
        self.blobs = BlobFolder(self.root)
        self._records = Records()
        self._referrers = LocalReferrers(self.root, self.blobs, self._records)
        for folder in (self._engines, self._selectors):
            folder.mkdir(exist_ok=True)
        if not (self.root / "oci-layout").exists():
            sync_folder(self.root / "blobs")
            self._replace(self.root / "oci-layout", canonical_json(oci.LAYOUT))

    @staticmethod
    def from_url(url: str) -> "LocalStore":
        """The store at a `file:///path` URL.

        Raises:
            InvalidField: the URL names a host, or no path.
        """
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise InvalidField(field="store", problem=f"{url!r} is not file:///path")
        return LocalStore(unquote(parts.path))

    @property
    def url(self) -> str:
        """Its folder."""
        return str(self.root)

    def check(self) -> None:
        """Returns at once: a folder that could be made is there."""

    # Reading: `ArtifactStore`.

    def find(self, selector: EngineSelector, max_format: int = 0) -> EngineManifest | None:
        """The newest engine that fits; see `ArtifactStore`."""
        folder = self._selector_folder(selector)
        names = [path.name for path in folder.iterdir()] if folder.exists() else []
        for engine in self._newest_first(names):
            if max_format == 0 or engine.format_version <= max_format:
                return engine
        return None

    def get(self, name: str) -> EngineManifest:
        """The engine of that name; see `ArtifactStore`."""
        engine = self._load(full_digest(name, self._key_digests))
        if engine is None:
            raise EngineNotFound(engine=name)
        return engine

    def list(self) -> tuple[EngineManifest, ...]:
        """All engines, newest first."""
        return self._newest_first(self._key_digests())

    def read(self, digest: str, offset: int = 0) -> Iterator[bytes]:
        """A blob's bytes, verified before the first one is given; see `ArtifactStore`."""
        return self.blobs.read(digest, offset)

    def read_all(self, digest: str) -> bytes:
        """The whole of a small blob, verified."""
        return self.blobs.read_all(digest)

    def blob_path(self, digest: str) -> Path:
        """Where a blob's bytes are, unverified; see `BlobFolder.path`."""
        return self.blobs.path(digest)

    def verified_path(self, digest: str) -> Path:
        """Where a blob's bytes are, verified; see `BlobFolder.verified_path`."""
        return self.blobs.verified_path(digest)

    def verify(self, engine: EngineManifest) -> None:
        """Hashes what was not hashed since it was written, of all of an engine's blobs.

        Raises:
            DigestMismatch: a blob holds other bytes; it was set aside.
            BlobNotFound: a blob is missing.
        """
        for blob in self.blobs_of(engine):
            self.blobs.verified_path(blob.digest)

    def blobs_of(self, engine: EngineManifest) -> tuple[Blob, ...]:
        """All blobs of an engine: manifest, configuration, layers."""
        config = oci.config_of(self.blobs.read_all(engine.manifest.digest))
        return (engine.manifest, config, *engine.layers)

    # Writing.

    def write_blob(self, chunks: Iterable[Bytes], media_type: str, title: str = "") -> Blob:
        """The blob that `chunks` make; on the disk when this returns.

        Raises:
            DiskFull: there is no room; nothing of the blob is left.
        """
        return self.blobs.write(chunks, media_type, title)

    def blob_writer(
        self, media_type: str, title: str = ""
    ) -> contextlib.AbstractContextManager[BlobWriter]:
        """A writer (`write(data)`) whose `blob` is there once the `with` block has ended well."""
        return self.blobs.writer(media_type, title)

    def adopt(self, blob: Blob) -> bool:
        """True if the blob is here and good: it is then pinned, and as young as a new one."""
        return self.blobs.adopt(blob)

    def pin(self) -> contextlib.AbstractContextManager[Pin]:
        """Keeps what is written or adopted within the `with` block from being swept."""
        return self.blobs.pin()

    def publish(self, draft: EngineDraft) -> EngineManifest:
        """The engine of the draft's key: this one, or the one that was published first.

        Raises:
            BlobNotFound: a layer is not in the store.
            DiskFull: there is no room; the engine has no name, or is whole.
        """
        with self.pin():
            config = self.blobs.write([oci.config_json(draft)], oci.CONFIG_TYPE)
            manifest = self.blobs.write([oci.manifest_json(draft, config)], oci.MANIFEST_TYPE)
            return self.commit(manifest, draft.key, draft.model, _now_s())

    def commit(
        self,
        manifest: Blob,
        key: EngineKey,
        model: str,
        created_s: float,
        instead: EngineManifest | None = None,
    ) -> EngineManifest:
        """Names the engine whose manifest and other blobs are here, unless another one has its name.

        Args:
            instead: that gives the name up, with what was said of it; whoever has its blobs in use keeps them.
        """
        record = EngineRecord(manifest, created_s)
        with self._naming():
            self._require(manifest, created_s)
            if instead is not None and self._load(key.digest) == instead:
                self._unname(instead)
            for name in {model, key.model_digest}:
                self._select(EngineSelector(name, key.arch, key.quant), key.digest)
            self._name(key.digest, record.to_json())
            engine = self._load(key.digest)
            assert engine is not None, "a committed engine is not complete"
            self._write_index()
        return engine

    def add_model_name(self, engine: EngineManifest, model: str) -> None:
        """Lets selectors find the engine by this model name too."""
        key = engine.key
        with self._naming():
            self._select(EngineSelector(model, key.arch, key.quant), key.digest)

    def add_signature(self, engine: EngineManifest, signature: Signature) -> EngineManifest:
        """Keeps a signature with the engine, once; gives it with all that it has.

        Raises:
            EngineNotFound: it has gone.
        """
        with self.pin(), self._naming():
            engine = self.get(engine.name)
            if signature in engine.signatures:
                return engine
            self._referrers.add_signature(engine, signature)
            self._write_index()
            return self.get(engine.name)

    def add_tuning(self, engine: EngineManifest, gpu: str, record: bytes) -> EngineManifest:
        """Keeps a GPU's tuning record with the engine, in the place of an older one; see `EngineStore`."""
        with self.pin(), self._naming():
            engine = self.get(engine.name)
            self._referrers.add_tuning(engine, gpu, record)
            self._write_index()
            return self.get(engine.name)

    def delete(self, name: str) -> EngineManifest:
        """Removes the engine's name; its blobs go with a later sweep.

        Raises:
            EngineNotFound: there is none.
        """
        with self._naming():
            engine = self.get(name)
            self._unname(engine)
        return engine

    def hold(self, engine: EngineManifest) -> Pin:
        """Keeps the engine from being evicted until the pin is released or this process ends.

        Raises:
            EngineNotFound: it is not here, or not any more.
        """
        pin = self.blobs.hold(blob.digest for blob in (engine.manifest, *engine.layers))
        try:
            os.utime(self._engines / engine.key.digest)  # when it was last used
        except FileNotFoundError:
            pin.release()
            raise EngineNotFound(engine=engine.name) from None
        return pin

    def last_used_s(self, engine: EngineManifest) -> float:
        """Unix time at which the engine was last held, or came here; 0 where it has gone."""
        try:
            return (self._engines / engine.key.digest).stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def evict(self, engine: EngineManifest) -> bool:
        """Removes the engine's names unless it is held; whether it was removed."""
        record = self._engines / engine.key.digest
        # Whoever holds an engine has pinned it before he looks for this file.
        gone = self.blobs.unless_held(
            engine.manifest.digest, lambda: record.unlink(missing_ok=True)
        )
        if gone:
            with self._naming():
                self._unname(engine)
        return gone

    def _unname(self, engine: EngineManifest) -> None:
        (self._engines / engine.key.digest).unlink(missing_ok=True)
        for path in self._selectors.glob(f"*/{engine.key.digest}"):
            path.unlink()
        self._referrers.remove(engine.key.digest)
        self._write_index()

    def sweep(self, grace_s: float = DEFAULT_GRACE_S) -> Sweep:
        """Removes blobs that no engine and no pin needs and that are older than `grace_s`."""
        index = self.root / "index.json"
        if index.exists() and self._records.read(index, oci.digests_in_index) is None:
            with self._naming():
                self._write_index()
        return self.blobs.sweep(self._referenced, grace_s)

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        # In this order everywhere: no sweep, then no other change of names.
        with (
            self.blobs.disk_full(),
            self.blobs.adding(),
            FileLock(self.root / "locks" / "names"),
        ):
            yield

    def _key_digests(self) -> Iterator[str]:
        return (path.name for path in self._engines.iterdir())

    def _newest_first(self, names: Iterable[str]) -> tuple[EngineManifest, ...]:
        engines = [engine for name in names if (engine := self._load(name)) is not None]
        return tuple(sorted(engines, key=lambda e: (e.created_s, e.key.digest), reverse=True))

    def _load(self, name: str) -> EngineManifest | None:
        # An engine that misses a blob is as good as absent: it is built or pulled again.
        path = self._engines / name
        try:
            record = self._records.read(path, EngineRecord.from_json)
            if record is None:
                return None
            engine = self._require(record.manifest, record.created_s)
            return replace(
                engine,
                signatures=self._referrers.signatures_of(name),
                tunings=self._referrers.tunings_of(name),
            )
        except InvalidField as error:
            self._records.pass_over(str(path), error)
            return None
        except (FileNotFoundError, BlobNotFound, DigestMismatch):
            return None

    def _require(self, manifest: Blob, created_s: float) -> EngineManifest:
        text = self.blobs.read_all(manifest.digest)
        config = self.blobs.read_all(oci.config_of(text).digest)
        engine = oci.engine_of(manifest, text, config, created_s)
        for blob in engine.layers:
            if not self.blobs.has(blob):
                raise BlobNotFound(digest=blob.digest)
        return engine

    def _selector_folder(self, selector: EngineSelector) -> Path:
        quant = selector.quant.resolved
        parts = [selector.model, selector.arch, quant.scheme, quant.group_size]
        if quant.kv_cache:
            parts.append(quant.kv_cache)
        return self._selectors / hashlib.sha256(canonical_json(parts)).hexdigest()

    def _select(self, selector: EngineSelector, name: str) -> None:
        folder = self._selector_folder(selector)
        folder.mkdir(exist_ok=True)
        (folder / name).touch()
        sync_folder(folder)
        sync_folder(self._selectors)

    def _name(self, name: str, record: bytes) -> None:
        path, new = self._engines / name, written_file(self.blobs.partial, record)
        try:
            os.link(new, path)
        except FileExistsError:
            # First publish wins, unless it lost a blob since.
            if self._load(name) is None:
                os.replace(new, path)
        finally:
            new.unlink(missing_ok=True)
        sync_folder(self._engines)

    def _write_index(self) -> None:
        engines = self.list()
        refs = []
        for ref, group in oci.group_by_index(engines).items():
            refs.append((ref, self.blobs.write([oci.index_json(group)], oci.INDEX_TYPE)))
        refs += [(engine.key.digest, engine.manifest) for engine in engines]
        for engine in engines:
            referrers = self._referrers.of(engine.key.digest)
            if referrers != Referrers():
                index = self.blobs.write([referrers_json(referrers)], oci.INDEX_TYPE)
                refs.append((referrers_ref(engine.manifest), index))
        self._replace(self.root / "index.json", oci.layout_index_json(refs))

    def _referenced(self) -> set[str]:
        index = self.root / "index.json"
        digests = oci.digests_in_index(index.read_bytes()) if index.exists() else set()
        for path in self._engines.iterdir():
            digests |= self._referenced_by(path)
        return digests

    def _referenced_by(self, record: Path) -> set[str]:
        # Blobs of an incomplete engine are kept: they need not be made or pulled again.
        said = self._records.read(record, EngineRecord.from_json)
        if said is None:
            return set()
        manifest = said.manifest
        try:
            text = self.blobs.read_in_sweep(manifest.digest)
            config, layers = oci.config_of(text), oci.layers_of(text)
        except (BlobNotFound, DigestMismatch, InvalidField):  # it does not say what it names
            return set()
        kept = self._referrers.digests_in_sweep(record.name)
        return {manifest.digest, config.digest, *(blob.digest for blob in layers), *kept}

    def _replace(self, path: Path, content: bytes) -> None:
        with self.blobs.adding():
            os.replace(written_file(self.blobs.partial, content), path)
        sync_folder(path.parent)


def _now_s() -> float:
    # No finer than what crosses the wire, so that an engine is equal on both sides.
    return round(time.time(), 6)
