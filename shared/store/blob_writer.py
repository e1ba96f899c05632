"""A blob on its way to the disk: written beside its place while it is hashed."""

import fcntl
import hashlib
import os
from pathlib import Path

from shared.engine import Blob

CHUNK_BYTES = 1 << 20

Bytes = bytes | bytearray | memoryview


class BlobWriter:
    """A blob being written. Made by `BlobFolder.writer`; not thread-safe."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size_bytes = 0
        self._blob: Blob | None = None
        self._hash = hashlib.sha256()
        # A sweep leaves partial files alone while they are locked.
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115 - closed by the folder
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def write(self, data: Bytes) -> None:
        """Appends `data`."""
        if not data:
            return
        view = memoryview(data).cast("B")
        self.size_bytes += len(view)
        # Small enough to be written from the cache that hashing filled.
        for start in range(0, len(view), CHUNK_BYTES):
            piece = view[start : start + CHUNK_BYTES]
            self._hash.update(piece)
            while piece:
                piece = piece[self._file.write(piece) :]

    @property
    def blob(self) -> Blob:
        """What was written, once the `with` block has ended well."""
        assert self._blob is not None, "the blob is not finished"
        return self._blob

    def finish(self, media_type: str, title: str) -> Blob:
        """What was written, which is on the disk from now on."""
        os.fsync(self._file.fileno())
        digest = f"sha256:{self._hash.hexdigest()}"
        self._blob = Blob(media_type, digest, self.size_bytes, title)
        return self._blob

    def close(self) -> None:
        """Removes what was not given its place, and lets sweeps have it."""
        self.path.unlink(missing_ok=True)
        self._file.close()
