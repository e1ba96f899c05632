"""Blobs by content, in the folder `blobs/sha256` of an OCI image layout.

A blob is written beside its place while it is hashed, and appears whole or not at all. A blob is
read only after it was hashed; what was found good is remembered by size, time and inode. One that
holds other bytes is set aside, so that whoever can make it or fetch it again does. What the bytes
mean, and which blobs belong together, is not known here.

    blobs/sha256/<hex>   blobs
    partial/<name>       blobs being written (locked by their writer) or pulled
    corrupt/<hex>        blobs set aside
    pins/<name>          what builds and pulls in progress need (pins.py)
    locks/store          shared: a blob, pin or name is being added; exclusive: a sweep
    locks/<hex>          a blob is being pulled
"""

import contextlib
import errno
import hashlib
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from shared.engine import Blob, is_digest
from shared.errors import BlobNotFound, DigestMismatch, DiskFull, InvalidField
from shared.store.blob_writer import CHUNK_BYTES, BlobWriter, Bytes
from shared.store.durable import sync_folder
from shared.store.locks import FileLock, try_lock
from shared.store.pins import Pin, pinned_digests

# Read and hashed at once. Around each piece a thread waits for Python's lock, which a loading engine
# holds most of the time: with pieces of 256 KiB, 16 GB took eight threads longer than everything else.
_HASH_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Sweep:
    """What a sweep removed."""

    num_blobs: int
    num_bytes: int


class BlobFolder:
    """The blobs of one store; may be used by several threads and processes at once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._blobs = root / "blobs" / "sha256"
        self.partial = root / "partial"
        self._corrupt = root / "corrupt"
        self._pins = root / "pins"
        self._locks = root / "locks"
        for folder in (self._blobs, self.partial, self._corrupt, self._pins, self._locks):
            folder.mkdir(parents=True, exist_ok=True)
        self._open_pins: list[Pin] = []
        self._open_pins_lock = threading.Lock()
        # Digest to what its file looked like when it was last hashed and found good.
        self._verified: dict[str, tuple[int, int, int]] = {}

    def path(self, digest: str) -> Path:
        """Where the blob's bytes are, unverified.

        Raises:
            BlobNotFound: there is none.
            InvalidField: malformed digest.
        """
        path = self._path(digest)
        if not path.exists():
            raise BlobNotFound(digest=digest)
        return path

    def verified_path(self, digest: str) -> Path:
        """Where the blob's bytes are, once they were found to be those of its name.

        Raises:
            BlobNotFound: there is none.
            DigestMismatch: it held other bytes, and was set aside.
        """
        with self.open_verified(digest):
            return self._path(digest)

    def open_verified(self, digest: str) -> FileIO:
        """The blob's file, at its start, once its bytes were found to be those of its name.

        Raises: as `verified_path`.
        """
        file = self.open(digest)
        try:
            self.verify(file, digest)
        except BaseException:
            file.close()
            raise
        return file

    def open(self, digest: str) -> FileIO:
        """The blob's file, at its start, unverified.

        Raises:
            BlobNotFound: there is none.
            InvalidField: malformed digest.
        """
        try:
            return FileIO(self._path(digest))
        except FileNotFoundError as error:
            raise BlobNotFound(digest=digest) from error

    def verify(self, file: FileIO, digest: str) -> None:
        """Hashes the blob's open file, unless it was hashed since it last changed.

        Raises:
            DigestMismatch: it holds other bytes, and was set aside.
        """
        before = _stamp(os.fstat(file.fileno()))
        if self._verified.get(digest) == before:
            return
        found = _digest(file, before[0])
        if found != digest:
            self._set_aside(digest, before)
            raise DigestMismatch(digest=digest, found=found)
        self._verified[digest] = before

    def has(self, blob: Blob) -> bool:
        """Claims that there is a file of this name and size; its bytes may be others."""
        try:
            return self._path(blob.digest).stat().st_size == blob.size_bytes
        except FileNotFoundError:
            return False

    def num_bytes(self, digest: str) -> int:
        """How many of the blob's bytes are here, pulled in part or whole."""
        for path in (self._path(digest), self.partial / digest.removeprefix("sha256:")):
            try:
                return path.stat().st_size
            except FileNotFoundError:
                continue
        return 0

    def total_bytes(self) -> int:
        """What all blobs take, with those that are being written, pulled or set aside."""
        total = 0
        for folder in (self._blobs, self.partial, self._corrupt):
            for entry in os.scandir(folder):
                with contextlib.suppress(FileNotFoundError):  # gone since the folder was read
                    total += entry.stat().st_size
        return total

    def pinned_bytes(self) -> int:
        """What of all that is kept by pins is here, pulled in part or whole."""
        with FileLock(self._locks / "store"):
            pinned = pinned_digests(self._pins)
        return sum(map(self.num_bytes, pinned))

    def adopt(self, blob: Blob) -> bool:
        """True if the blob is here and good: it is then pinned, and as young as a new one."""
        path = self._path(blob.digest)
        with self.adding():
            if not path.exists():
                return False
            self._pin(blob.digest)
            is_verified = self._verified.get(blob.digest) == _stamp(path.stat())
            os.utime(path)
            if is_verified:
                self._verified[blob.digest] = _stamp(path.stat())
        try:
            return self.verified_path(blob.digest).stat().st_size == blob.size_bytes
        except (BlobNotFound, DigestMismatch):  # set aside: the caller makes it anew
            return False

    def read(self, digest: str, offset: int = 0) -> Iterator[bytes]:
        """The blob's bytes from `offset` on, in pieces of at most 1 MiB; see `ArtifactStore`."""
        file = self.open_verified(digest)
        if not 0 <= offset <= os.fstat(file.fileno()).st_size:
            file.close()
            raise InvalidField(field="offset_bytes", problem=f"{offset} is outside of {digest}")
        return _chunks(file, offset)

    def read_all(self, digest: str) -> bytes:
        """The whole of a small blob, verified."""
        return b"".join(self.read(digest))

    def read_in_sweep(self, digest: str) -> bytes:
        """The whole of a small blob, verified; one that holds other bytes stays where it is.

        Setting it aside would wait for the sweep that asks. A later reader does it.

        Raises:
            BlobNotFound: there is none.
            DigestMismatch: it holds other bytes.
        """
        with self.open(digest) as file:
            content = file.readall()
        found = f"sha256:{hashlib.sha256(content).hexdigest()}"
        if found != digest:
            raise DigestMismatch(digest=digest, found=found)
        return content

    @contextlib.contextmanager
    def writer(self, media_type: str, title: str = "") -> Iterator[BlobWriter]:
        """A writer whose `blob` is on the disk once the `with` block has ended well.

        Raises:
            DiskFull: there is no room; nothing of the blob is left.
        """
        with self.disk_full():
            with self.adding():
                writer = BlobWriter(self.partial / f"{os.getpid()}-{uuid.uuid4().hex}")
            try:
                yield writer
                blob = writer.finish(media_type, title)
                self.place(writer.path, blob.digest)
            finally:
                writer.close()

    def write(self, chunks: Iterable[Bytes], media_type: str, title: str = "") -> Blob:
        """The blob that `chunks` make; on the disk when this returns.

        Raises:
            DiskFull: there is no room; nothing of the blob is left.
        """
        with self.writer(media_type, title) as writer:
            for chunk in chunks:
                writer.write(chunk)
        return writer.blob

    def place(self, partial: Path, digest: str) -> None:
        """Makes a file, known to hold `digest`'s bytes and to be on the disk, the blob.

        An older file of the blob is replaced, because it may be corrupt; its readers keep it.
        """
        path = self._path(digest)
        with self.adding():
            self._pin(digest)
            os.replace(partial, path)
        sync_folder(path.parent)
        self._verified[digest] = _stamp(path.stat())

    def adding(self) -> FileLock:
        """A lock that keeps sweeps away while a blob or a name is added."""
        return FileLock(self._locks / "store", shared=True)

    def pull_lock(self, digest: str) -> FileLock:
        """A lock that one puller of this blob on this machine holds."""
        return FileLock(self._locks / self._path(digest).name, removes=True)

    @contextlib.contextmanager
    def pin(self) -> Iterator[Pin]:
        """Keeps every blob that is written or adopted here meanwhile, by any thread."""
        with self.disk_full(), self.adding():
            pin = Pin(self._pins)
        with self._open_pins_lock:
            self._open_pins.append(pin)
        try:
            yield pin
        finally:
            with self._open_pins_lock:
                self._open_pins.remove(pin)
                pin.release()

    def hold(self, digests: Iterable[str]) -> Pin:
        """Keeps these blobs until the pin is released or this process ends."""
        with self.disk_full(), self.adding():
            pin = Pin(self._pins)
            try:
                for digest in digests:
                    pin.add(digest)
            except BaseException:
                pin.release()
                raise
        return pin

    def unless_held(self, digest: str, then: Callable[[], None]) -> bool:
        """Does `then` while no pin can be made, if none keeps the blob; whether it was done."""
        with FileLock(self._locks / "store"):
            if digest in pinned_digests(self._pins):
                return False
            then()
            return True

    def sweep(self, referenced: Callable[[], set[str]], grace_s: float) -> Sweep:
        """Removes blobs that nothing needs.

        Args:
            referenced: gives the digests to keep; called while nothing can be added, so it
                reads blobs by `read_in_sweep`.
            grace_s: keeps what was written or adopted less than this ago.
        """
        num_blobs = num_bytes = 0
        with FileLock(self._locks / "store"):
            keep = referenced() | pinned_digests(self._pins)
            old = time.time() - grace_s
            for path in self._blobs.iterdir():
                status = path.stat()
                if f"sha256:{path.name}" not in keep and status.st_mtime <= old:
                    path.unlink()
                    num_blobs, num_bytes = num_blobs + 1, num_bytes + status.st_size
            for path in (*self.partial.iterdir(), *self._corrupt.iterdir()):
                if path.parent != self.partial or f"sha256:{path.name}" not in keep:
                    _remove_abandoned(path, old)
        return Sweep(num_blobs, num_bytes)

    @contextlib.contextmanager
    def disk_full(self) -> Iterator[None]:
        """Turns the system's words for a full disk into ours."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise DiskFull(path=self.root) from error

    def _path(self, digest: str) -> Path:
        if not is_digest(digest):
            problem = f"{digest!r} is not sha256: and 64 lowercase hexadecimal digits"
            raise InvalidField(field="digest", problem=problem)
        return self._blobs / digest.removeprefix("sha256:")

    def _pin(self, digest: str) -> None:
        with self._open_pins_lock:
            for pin in self._open_pins:
                pin.add(digest)

    def _set_aside(self, digest: str, stamp: tuple[int, int, int]) -> None:
        self._verified.pop(digest, None)
        path = self._path(digest)
        try:
            with self.adding():
                # Somebody may have put a good file there since.
                if path.exists() and _stamp(path.stat()) == stamp:
                    os.replace(path, self._corrupt / path.name)
        except OSError as error:
            # A reader that may not write refuses the blob all the same; its owner sets it aside.
            if error.errno not in (errno.EROFS, errno.EACCES):
                raise


def _chunks(file: FileIO, offset: int) -> Iterator[bytes]:
    with file:
        file.seek(offset)
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _digest(file: FileIO, num_bytes: int) -> str:
    """Of the whole file, which is at its start afterwards."""
    found, buffer = hashlib.sha256(), memoryview(bytearray(min(num_bytes, _HASH_BYTES)))
    file.seek(0)
    while count := file.readinto(buffer):
        found.update(buffer[:count])
    file.seek(0)
    return f"sha256:{found.hexdigest()}"


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino


def _remove_abandoned(path: Path, old: float) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:  # finished since the folder was read
        return
    try:
        if os.fstat(fd).st_mtime <= old and try_lock(fd):
            path.unlink(missing_ok=True)
    finally:
        os.close(fd)
