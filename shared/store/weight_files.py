"""An engine's weight blobs as open files, and their hashing in threads; what is in them, and torch, are not known here.

Apart from `weights.py`, so that a process can begin to hash before it imports what computes.
"""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO

from shared.engine import WEIGHTS_TYPE, EngineManifest
from shared.errors import DigestMismatch
from shared.store.local import LocalStore

_MOST_VERIFY_THREADS = 16


def num_verify_threads(num_cores: int) -> int:
    """Half of the cores at most: what a process imports while it hashes is starved otherwise."""
    return max(1, min(num_cores // 2, _MOST_VERIFY_THREADS))


class WeightFiles:
    """Opened as they are asked for; a context manager, which ends hashing and closes them."""

    def __init__(self, store: LocalStore, engine: EngineManifest) -> None:
        self._store = store
        self._blobs = tuple(blob for blob in engine.layers if blob.media_type == WEIGHTS_TYPE)
        self._files: dict[int, FileIO] = {}
        self._hashes: list[Future[None]] | None = None

    def __enter__(self) -> "WeightFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def num_bytes(self) -> int:
        """Of all weight blobs."""
        return sum(blob.size_bytes for blob in self._blobs)

    def file(self, number: int) -> FileIO:
        """The blob of that number; from several threads only after `start_verify`, which opens all.

        Raises:
            DigestMismatch: it has not the size that it should have.
            BlobNotFound: it is missing.
        """
        if number not in self._files:
            blob = self._blobs[number]
            file = self._files[number] = self._store.blobs.open(blob.digest)
            if os.fstat(file.fileno()).st_size != blob.size_bytes:
                self._store.blobs.verify(file, blob.digest)
                raise self.cut_short(number)
        return self._files[number]

    def cut_short(self, number: int) -> DigestMismatch:
        """The error of a blob that has another size than it should have."""
        return DigestMismatch(digest=self._blobs[number].digest, found="another size")

    def start_verify(self) -> None:
        """Begins to hash all weight blobs in threads, beside whatever the caller does next."""
        if self._hashes is not None:
            return
        # Opened here: what is hashed is what is read, whatever happens to the names.
        files = [self.file(number) for number in range(len(self._blobs))]
        num_threads = num_verify_threads(os.cpu_count() or 1)
        pool = ThreadPoolExecutor(num_threads, thread_name_prefix="verify-weights")
        self._hashes = [
            pool.submit(self._store.blobs.verify, file, blob.digest)
            for file, blob in zip(files, self._blobs, strict=True)
        ]
        pool.shutdown(wait=False)

    def verify(self) -> None:
        """Returns once all weight blobs were hashed and hold the right bytes.

        Raises:
            DigestMismatch: one does not.
        """
        self.start_verify()
        for pending in self._hashes or ():
            pending.result()

    def close(self) -> None:
        """Ends hashing and closes the files."""
        for pending in self._hashes or ():
            if not pending.cancel():
                pending.exception()  # only waited for: `verify` is who raises it
        for file in self._files.values():
            file.close()
