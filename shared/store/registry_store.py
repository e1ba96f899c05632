"""Engines in a registry: a store that many machines share. What they are in it, whichever registry it is:

    tag <key digest>        the engine's manifest: the commit point, pushed when its blobs are there
    tag <model>-<quant>     the image index of the engines that have this name, newest first; one for
                            each name of the model and one for its digest: what selectors ask for
    tag sha256-<manifest>   the index of what refers to it (the referrers tag schema)

So a push that breaks off leaves blobs that nobody names, never half an engine.
"""

import contextlib
import hashlib
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from functools import partial

from shared.engine import (
    TUNING_TYPE,
    Blob,
    EngineKey,
    EngineManifest,
    EngineSelector,
    Signature,
)
from shared.errors import (
    BlobNotFound,
    DigestMismatch,
    EngineNotFound,
    InvalidField,
    StoreUnreachable,
)
from shared.store import oci
from shared.store.blobs import Sweep
from shared.store.local import DEFAULT_GRACE_S, LocalStore
from shared.store.pull import Report
from shared.store.records import Records, full_digest
from shared.store.referrers import (
    EMPTY,
    EMPTY_CONTENT,
    Referrers,
    referrers_json,
    referrers_of,
    referrers_ref,
    signature_json,
    signature_of,
    tuning_json,
    tuning_of,
)
from shared.store.registry import Registry, TagMoved, change_tag

_NUM_THREADS = 4
_ENGINE_TAG = re.compile(r"[0-9a-f]{64}")


class RegistryStore:
    """An `EngineStore` in a registry; may be used by several threads and processes at once."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        # By the manifest's digest: what a digest names does not change.
        self._engines: dict[str, EngineManifest] = {}
        self._records = Records()

    @property
    def url(self) -> str:
        """Where it is, for people: no secret."""
        return self.registry.url

    # Reading: `ArtifactStore`.

    def find(self, selector: EngineSelector, max_format: int = 0) -> EngineManifest | None:
        """The newest engine that fits; see `ArtifactStore`."""
        for entry in self._entries(oci.index_ref(selector.model, selector.quant)):
            if entry.arch in ("", selector.arch):
                engine = self._engine(entry.manifest.digest, entry.created_s)
                if engine is not None and _fits(engine, selector, max_format, entry.model):
                    return self._with_referrers(engine)
        # Not every registry knows a conditional update: an index may still lack one.
        for engine in self.list():
            if _fits(engine, selector, max_format):
                return engine
        return None

    def get(self, name: str) -> EngineManifest:
        """The engine of that name; see `ArtifactStore`."""
        engine = self._tagged(full_digest(name, self._key_digests))
        if engine is None:
            raise EngineNotFound(engine=name)
        return self._with_referrers(self._dated(engine))

    def list(self) -> tuple[EngineManifest, ...]:
        """All engines, newest first."""
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            found = [
                engine
                for engine in pool.map(self._tagged, self._key_digests())
                if engine is not None
            ]
            indexes = pool.map(self._entries, {_digest_ref(engine.key) for engine in found})
            created = {e.manifest.digest: e.created_s for entries in indexes for e in entries}
            dated = [replace(e, created_s=created.get(e.manifest.digest, 0.0)) for e in found]
            signed = tuple(pool.map(self._with_referrers, dated))
        return tuple(sorted(signed, key=lambda e: (e.created_s, e.key.digest), reverse=True))

    def read(self, digest: str, offset: int = 0) -> Iterator[bytes]:
        """A blob's bytes, unverified; a manifest's too. See `ArtifactStore`."""
        if offset < 0:
            raise InvalidField(field="offset_bytes", problem=f"{offset} is outside of {digest}")
        try:
            yield from self.registry.read(digest, offset)
        except BlobNotFound:
            # Registries keep manifests apart.
            found = self.registry.manifest(digest)
            if found is None:
                raise
            yield found[1][offset:]

    # Writing.

    def push(
        self, local: LocalStore, engine: EngineManifest, report: Report | None = None
    ) -> EngineManifest:
        """The engine of that key in the registry: this one, or the one that was pushed first.

        Blobs that are there are not sent again.

        Args:
            local: holds `engine` whole.
            report: called with (bytes that are there, bytes of the engine) as blobs arrive; what it
                raises ends the push.
        Raises:
            BlobNotFound, DigestMismatch: it does not.
            StoreUnreachable: the registry was lost; pushing again goes on where this stopped.
        """
        there = self._tagged(engine.key.digest)
        if there is None or there.manifest == engine.manifest:
            # Also where what has the tag makes no sense: this mends it. What gets it while blobs are sent stays.
            tagged = self.registry.manifest(engine.key.digest) if there is None else None
            self._push_blobs(local, engine, report)
            text = local.read_all(engine.manifest.digest)
            replaced = there.manifest.digest if there else tagged[0].digest if tagged else None
            with contextlib.suppress(TagMoved):  # somebody was first
                self.registry.put_manifest(
                    text, oci.MANIFEST_TYPE, engine.key.digest, replaces=replaced
                )
                # A sweep that looked before the tag was there may have taken what was old.
                self._push_blobs(local, engine, None)
            there = self._tagged(engine.key.digest)
            if there is None:
                raise StoreUnreachable(store=self.url, problem="it forgot what was pushed")
        there = replace(there, created_s=engine.created_s)
        for model in sorted({engine.model, engine.key.model_digest}):
            self.add_model_name(there, model)
        there = self._dated(there)
        for signature in engine.signatures:
            there = self.add_signature(there, signature)
        for tuning in engine.tunings:
            there = self.add_tuning(there, tuning.title, local.read_all(tuning.digest))
        return self._with_referrers(there)

    def add_model_name(self, engine: EngineManifest, model: str) -> None:
        """Lets selectors find the engine by this model name too."""
        new = oci.IndexEntry(engine.manifest, engine.key.arch, model, engine.created_s)

        tag = oci.index_ref(model, engine.key.quant)

        def add(index: bytes | None) -> bytes:
            entries = self._listed(tag, index)
            others = [e for e in entries if e.manifest != new.manifest]
            is_there = any(e.model == model for e in entries if e.manifest == new.manifest)
            return index if index and is_there else oci.named_index_json([new, *others])

        change_tag(self.registry, tag, add)

    def add_signature(self, engine: EngineManifest, signature: Signature) -> EngineManifest:
        """Keeps a signature with the engine, once; gives it with all that it has.

        Raises:
            EngineNotFound: it has gone.
        """
        engine = self.get(engine.name)
        if signature in engine.signatures:
            return engine
        if not self.registry.has(EMPTY.digest):
            self.registry.upload(EMPTY, EMPTY_CONTENT)
        content = signature_json(signature, engine.manifest)
        manifest = self.registry.put_manifest(content, oci.MANIFEST_TYPE)
        tag = referrers_ref(engine.manifest)

        def add(index: bytes | None) -> bytes:
            old = self._referring(tag, index)
            is_there = any(blob.digest == manifest.digest for blob in old.signatures)
            new = replace(old, signatures=(*old.signatures, manifest))
            return index if index and is_there else referrers_json(new)

        change_tag(self.registry, tag, add)
        return self._with_referrers(engine)

    def add_tuning(self, engine: EngineManifest, gpu: str, record: bytes) -> EngineManifest:
        """Keeps a GPU's tuning record with the engine, in the place of an older one; see `EngineStore`."""
        engine = self.get(engine.name)
        blob = replace(oci.blob_from(record, TUNING_TYPE), title=gpu)
        for each, content in ((EMPTY, EMPTY_CONTENT), (blob, record)):
            if not self.registry.has(each.digest):
                self.registry.upload(each, content)
        text = tuning_json(blob, engine.manifest)
        manifest = self.registry.put_manifest(text, oci.MANIFEST_TYPE)
        tag = referrers_ref(engine.manifest)

        def add(index: bytes | None) -> bytes:
            old = self._referring(tag, index)
            if index and any(b.digest == manifest.digest for b in old.tunings):
                return index
            others = [b for b in old.tunings if (t := self._tuning_of(b)) and t.title != gpu]
            return referrers_json(replace(old, tunings=(*others, manifest)))

        change_tag(self.registry, tag, add)
        return self._with_referrers(engine)

    def delete(self, name: str) -> EngineManifest:
        """Removes the engine's manifest, and with it all of its names; blobs are the registry's.

        Raises:
            EngineNotFound: there is none.
            StoreRefused: the registry deletes nothing; nothing was changed.
        """
        engine = self.get(name)
        digest = engine.manifest.digest
        self.registry.delete_manifest(digest)
        found = self._referrers(engine.manifest)
        for blob in (*found.signatures, *found.tunings):
            self.registry.delete_manifest(blob.digest)
        referrers = referrers_ref(engine.manifest)

        def remove(tag: str, index: bytes | None) -> bytes | None:
            entries = self._listed(tag, index)
            left = [entry for entry in entries if entry.manifest.digest != digest]
            if len(left) == len(entries):
                return index
            return oci.named_index_json(left) if left else None

        for tag in self.registry.tags():
            if not _ENGINE_TAG.fullmatch(tag):
                change_tag(
                    self.registry,
                    tag,
                    (lambda _: None) if tag == referrers else partial(remove, tag),
                )
        return engine

    def sweep(self, grace_s: float = DEFAULT_GRACE_S) -> Sweep:
        """Removes blobs that no engine needs and that are older than `grace_s`.

        Raises:
            StoreRefused: the registry does that by itself.
        """
        return self.registry.sweep(grace_s)

    def check(self) -> None:
        """Returns if the registry answers and takes our credentials.

        Raises:
            StoreUnreachable, StoreRefused, StoreNotFound: it does not.
        """
        self.registry.check()

    def _push_blobs(self, local: LocalStore, engine: EngineManifest, report: Report | None) -> None:
        def push(blob: Blob) -> None:
            if not self.registry.adopt(blob.digest):
                self.registry.upload(blob, local.verified_path(blob.digest))

        blobs = {blob.digest: blob for blob in local.blobs_of(engine) if blob != engine.manifest}
        done, total = 0, sum(blob.size_bytes for blob in blobs.values())
        with ThreadPoolExecutor(_NUM_THREADS, "push") as pool:
            pushes = {pool.submit(push, blob): blob for blob in blobs.values()}
            try:
                for pushed in as_completed(pushes):
                    pushed.result()
                    done += pushes[pushed].size_bytes
                    if report is not None:
                        report(done, total)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _key_digests(self) -> Iterator[str]:
        return (tag for tag in self.registry.tags() if _ENGINE_TAG.fullmatch(tag))

    def _tagged(self, tag: str) -> EngineManifest | None:
        engine = self._engine(tag)
        return engine if engine is not None and engine.key.digest == tag else None

    def _engine(self, reference: str, created_s: float = 0.0) -> EngineManifest | None:
        """The engine whose manifest has that tag or digest; None where it is not an engine's."""
        found = self.registry.manifest(reference)
        if found is None or found[0].media_type != oci.MANIFEST_TYPE:
            return None
        manifest, text = found
        if manifest.digest not in self._engines:
            try:
                self._engines[manifest.digest] = self._read_engine(manifest, text)
            except (InvalidField, BlobNotFound, DigestMismatch) as error:
                self._records.pass_over(f"{self.url} {reference}", error)
                return None
        return replace(self._engines[manifest.digest], created_s=created_s)

    def _read_engine(self, manifest: Blob, text: bytes) -> EngineManifest:
        _require_digest(manifest.digest, text)
        config = oci.config_of(text)
        config_text = b"".join(self.registry.read(config.digest))
        _require_digest(config.digest, config_text)
        return oci.engine_of(manifest, text, config_text, 0.0)

    def _dated(self, engine: EngineManifest) -> EngineManifest:
        for entry in self._entries(_digest_ref(engine.key)):
            if entry.manifest.digest == engine.manifest.digest:
                return replace(engine, created_s=entry.created_s)
        return engine

    def _with_referrers(self, engine: EngineManifest) -> EngineManifest:
        referrers = self._referrers(engine.manifest)
        artifacts = (self.registry.manifest(blob.digest) for blob in referrers.signatures)
        read = (signature_of(artifact[1]) for artifact in artifacts if artifact is not None)
        found = {signature for signature in read if signature is not None}
        records = filter(None, map(self._tuning_of, referrers.tunings))
        tunings = sorted(records, key=lambda blob: blob.title)
        return replace(engine, signatures=tuple(sorted(found)), tunings=tuple(tunings))

    def _tuning_of(self, artifact: Blob) -> Blob | None:
        """The record that the artifact holds; None where it is lost, and tells nothing."""
        found = self.registry.manifest(artifact.digest)
        return None if found is None else tuning_of(found[1])

    def _referrers(self, manifest: Blob) -> Referrers:
        tag = referrers_ref(manifest)
        found = self.registry.manifest(tag)
        return self._referring(tag, None if found is None else found[1])

    def _referring(self, tag: str, index: bytes | None) -> Referrers:
        """What the index of that tag lists; nothing where there is no sense in it."""
        if index is None:
            return Referrers()
        said = self._records.parse(f"{self.url} {tag}", index, referrers_of)
        return said or Referrers()

    def _entries(self, tag: str) -> tuple[oci.IndexEntry, ...]:
        found = self.registry.manifest(tag)
        is_index = found is not None and found[0].media_type == oci.INDEX_TYPE
        return self._listed(tag, found[1] if found is not None and is_index else None)

    def _listed(self, tag: str, index: bytes | None) -> tuple[oci.IndexEntry, ...]:
        """What the index of that tag lists; nothing where there is no sense in it."""
        if index is None:
            return ()
        return self._records.parse(f"{self.url} {tag}", index, oci.entries_of) or ()


def _digest_ref(key: EngineKey) -> str:
    return oci.index_ref(key.model_digest, key.quant)


def _fits(
    engine: EngineManifest, selector: EngineSelector, max_format: int, model: str = ""
) -> bool:
    key, quant, wanted = engine.key, engine.key.quant.resolved, selector.quant.resolved
    return (
        selector.model in (model, engine.model, key.model_digest)
        and (key.arch, quant.scheme) == (selector.arch, wanted.scheme)
        and (quant.group_size, quant.kv_cache) == (wanted.group_size, wanted.kv_cache)
        and (max_format == 0 or engine.format_version <= max_format)
    )


def _require_digest(digest: str, content: bytes) -> None:
    found = f"sha256:{hashlib.sha256(content).hexdigest()}"
    if found != digest:
        raise DigestMismatch(digest=digest, found=found)
