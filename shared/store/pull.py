"""Copying an engine into a local store, every byte verified."""

import contextlib
import fcntl
import hashlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from io import FileIO

from shared.engine import Blob, EngineManifest
from shared.errors import BlobNotFound, DigestMismatch, MillraceError
from shared.store import oci
from shared.store.artifact_store import ArtifactStore
from shared.store.blobs import BlobFolder
from shared.store.local import LocalStore

Report = Callable[[int, int], None]

_NUM_STREAMS = 4
# Before another try at a blob whose source was lost, while not one more byte comes.
_WAITS_S = (0.2, 0.5, 1.0, 2.0)


def pull(
    source: ArtifactStore,
    engine: EngineManifest,
    into: LocalStore,
    report: Report | None = None,
    instead: EngineManifest | None = None,
) -> EngineManifest:
    """The engine, complete and verified in `into`, with its signatures; or the one of its key that was there first.

    What is there and good is kept, what is corrupt is fetched again, what was fetched in part is
    resumed. Concurrent pulls on one machine fetch a blob once.

    Args:
        report: called with (bytes that are here, bytes of the engine) as they come.
        instead: of the same key, in `into`: it gives its name up once the other one is whole.
    Raises:
        DigestMismatch: the source gave other bytes, twice.
        BlobNotFound: the source lacks a blob.
        CompilerUnreachable, StoreUnreachable: the source was lost, and did not come back for some
            seconds; pulling again resumes.
        DiskFull: there is no room; what was fetched so far is kept for a while.
    """
    total = engine.manifest.size_bytes + sum(blob.size_bytes for blob in engine.layers)
    done, counting = 0, threading.Lock()

    def count(num_bytes: int) -> None:
        nonlocal done
        with counting:
            done += num_bytes
            if report is not None:
                report(done, total)

    with into.pin():
        _fetch(source, engine.manifest, into.blobs, count)
        manifest_text = into.read_all(engine.manifest.digest)
        config = oci.config_of(manifest_text)
        _fetch(source, config, into.blobs, lambda num_bytes: None)
        pulled = oci.engine_of(
            engine.manifest, manifest_text, into.read_all(config.digest), engine.created_s
        )
        if pulled.key != engine.key:
            raise DigestMismatch(digest=engine.name, found=pulled.name)
        _fetch_all(source, pulled.layers, into.blobs, count)
        pulled = into.commit(pulled.manifest, pulled.key, pulled.model, pulled.created_s, instead)
        if pulled.manifest != engine.manifest:
            return pulled  # published here first: what is said of the other one is not true of it
        for signature in engine.signatures:
            pulled = into.add_signature(pulled, signature)
        for tuning in engine.tunings:
            with contextlib.suppress(BlobNotFound):  # another one took its place meanwhile
                pulled = add_tuning_from(source, pulled, tuning, into)
        return pulled


def add_tuning_from(
    source: ArtifactStore, engine: EngineManifest, tuning: Blob, into: LocalStore
) -> EngineManifest:
    """The engine, which lies in `into`, with a tuning record that `source` has of it.

    Raises:
        DigestMismatch, BlobNotFound, CompilerUnreachable, StoreUnreachable, DiskFull: as `pull`.
    """
    with into.pin():
        _fetch(source, tuning, into.blobs, lambda num_bytes: None)
        return into.add_tuning(engine, tuning.title, into.read_all(tuning.digest))


def _fetch_all(
    source: ArtifactStore, layers: Iterable[Blob], blobs: BlobFolder, count: Callable[[int], None]
) -> None:
    """Fetches several at once; the first that fails keeps those from beginning that have not begun."""
    with ThreadPoolExecutor(_NUM_STREAMS, "pull") as pool:
        fetches = [pool.submit(_fetch, source, blob, blobs, count) for blob in layers]
        try:
            for fetched in as_completed(fetches):
                fetched.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _fetch(
    source: ArtifactStore, blob: Blob, blobs: BlobFolder, count: Callable[[int], None]
) -> None:
    with blobs.disk_full(), blobs.pull_lock(blob.digest):
        if blobs.adopt(blob):
            count(blob.size_bytes)
            return
        path = blobs.partial / blob.digest.removeprefix("sha256:")
        with contextlib.ExitStack() as opened:
            # No sweep comes between, and later ones leave what is locked alone.
            with blobs.adding():
                file = opened.enter_context(FileIO(path, "a+"))
                fcntl.flock(file, fcntl.LOCK_EX)
            was_resumed = file.seek(0, os.SEEK_END) > 0
            found = _download(source, blob, file, count)
            if found != blob.digest and was_resumed:
                # What was left of an earlier pull may be to blame.
                count(-file.seek(0, os.SEEK_END))
                file.truncate(0)
                found = _download(source, blob, file, count)
            if found != blob.digest:
                path.unlink()
                raise DigestMismatch(digest=blob.digest, found=found)
            os.fsync(file.fileno())
            blobs.place(path, blob.digest)


def _download(source: ArtifactStore, blob: Blob, file: FileIO, count: Callable[[int], None]) -> str:
    """Appends to `file` what it lacks; the digest of all of it."""
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256")
    size = file.tell()
    count(size)
    num_waits = 0
    while size < blob.size_bytes:
        try:
            for chunk in source.read(blob.digest, size):
                _append(file, chunk)
                digest.update(chunk)
                size += len(chunk)
                num_waits = 0
                count(len(chunk))
                if size > blob.size_bytes:  # a source without end must not fill the disk
                    break
            break
        except MillraceError as error:
            # One that says when to try again was lost: what is here is gone on with.
            if error.retry_after_s is None or num_waits == len(_WAITS_S):
                raise
        time.sleep(_WAITS_S[num_waits] * random.uniform(0.5, 1.0))
        num_waits += 1
    return f"sha256:{digest.hexdigest()}"


def _append(file: FileIO, chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:
        view = view[file.write(view) :]
