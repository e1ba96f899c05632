"""Weights in the store: packed tensors in blobs, found through the layer `weights.json`.

Where they lie in blobs is `shared/weight_layout.py`; what a weight's roles mean is not known here.
"""

import contextlib
import math
import mmap
import os
from collections.abc import Mapping
from types import TracebackType

import torch

from shared.engine import (
    MAX_WEIGHT_BLOB_BYTES,
    WEIGHT_INDEX_TYPE,
    WEIGHTS_TYPE,
    Blob,
    EngineManifest,
    StoredTensor,
    WeightIndex,
)
from shared.store.blob_writer import BlobWriter
from shared.store.local import LocalStore
from shared.store.weight_files import WeightFiles
from shared.weight_layout import WeightLayout, tensor_bytes

INDEX_TITLE = "weights.json"


def weights_title(blob: int) -> str:
    """The title of an engine's weight blob of that number."""
    return f"weights/{blob:05}"


class WeightWriter:
    """Streams packed tensors into blobs; a context manager, and not thread-safe.

    The same tensors in the same order give the same blobs.

    Args:
        max_blob_bytes: as in `WeightLayout`.
    """

    def __init__(self, store: LocalStore, max_blob_bytes: int = MAX_WEIGHT_BLOB_BYTES) -> None:
        self._store = store
        self._layout = WeightLayout(max_blob_bytes)
        self._tensors: dict[str, dict[str, StoredTensor]] = {}
        self._blobs: list[Blob] = []
        self._writer: BlobWriter | None = None
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "WeightWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._writer is not None and error is None:
            unfinished = AssertionError("weights were written and never finished")
            self._open.__exit__(AssertionError, unfinished, None)
            raise unfinished
        self._open.__exit__(kind, error, traceback)

    def add(self, name: str, roles: Mapping[str, torch.Tensor]) -> None:
        """Appends a weight's packed tensors, which the caller keeps.

        Raises:
            DiskFull: there is no room.
        """
        assert name not in self._tensors, f"weight {name!r} is written twice"
        self._tensors[name] = {role: self._append(tensor) for role, tensor in roles.items()}

    def finish(self) -> tuple[Blob, ...]:
        """The engine's weight layers: the index `weights.json`, then the blobs in order."""
        self._end_blob()
        index = self._store.write_blob([self.index.to_json()], WEIGHT_INDEX_TYPE, INDEX_TITLE)
        return (index, *self._blobs)

    @property
    def index(self) -> WeightIndex:
        """Where everything lies that was added so far."""
        return WeightIndex(self._tensors)

    def _append(self, tensor: torch.Tensor) -> StoredTensor:
        stored = self._layout.place(tensor)
        if stored.blob > len(self._blobs):
            self._end_blob()
        if self._writer is None:
            title = weights_title(stored.blob)
            self._writer = self._open.enter_context(self._store.blob_writer(WEIGHTS_TYPE, title))
        self._writer.write(b"\0" * (stored.offset - self._writer.size_bytes))
        self._writer.write(tensor_bytes(tensor))
        return stored

    def _end_blob(self) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            self._open.close()
            self._blobs.append(writer.blob)


class WeightReader:
    """An engine's packed tensors, mapped into memory; a context manager.

    Nothing may be served before `verify()` has returned. Tensors stay valid after `close()`.

    Args:
        files: the engine's, which may be hashed already; closed with the reader.
    """

    def __init__(
        self, store: LocalStore, engine: EngineManifest, files: WeightFiles | None = None
    ) -> None:
        self.index = WeightIndex.from_json(store.read_all(engine.layer(INDEX_TITLE).digest))
        self._files = files or WeightFiles(store, engine)
        self._maps: dict[int, mmap.mmap] = {}

    def __enter__(self) -> "WeightReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def num_bytes(self) -> int:
        """Bytes of all weight blobs."""
        return self._files.num_bytes

    def tensor(self, name: str, role: str = "weight") -> torch.Tensor:
        """One packed tensor; writing to it changes neither the file nor another reader's.

        Raises:
            KeyError: no such weight or role.
            DigestMismatch: its blob has not the size that it should have.
            BlobNotFound: its blob is missing.
        """
        stored = self.index.tensors[name][role]
        dtype = getattr(torch, stored.dtype)
        assert isinstance(dtype, torch.dtype), f"{stored.dtype!r} is no dtype"
        num_bytes = math.prod(stored.shape) * dtype.itemsize
        if num_bytes == 0:
            return torch.empty(stored.shape, dtype=dtype)
        content = torch.frombuffer(
            self._map(stored.blob), dtype=torch.uint8, count=num_bytes, offset=stored.offset
        )
        return content.view(dtype).reshape(stored.shape)

    def roles(self, name: str) -> dict[str, torch.Tensor]:
        """All packed tensors of a weight, by role; KeyError where there is no such weight."""
        return {role: self.tensor(name, role) for role in self.index.tensors[name]}

    def read_into(self, buffer: memoryview, name: str, role: str, start: int) -> None:
        """Fills `buffer` with a packed tensor's bytes from `start` on; for threads, after `start_verify`.

        Raises:
            DigestMismatch: the blob ends before.
        """
        stored = self.index.tensors[name][role]
        fd, at = self._files.file(stored.blob).fileno(), stored.offset + start
        while buffer:
            count = os.preadv(fd, [buffer], at)
            if not count:  # cut short since it was opened
                raise self._files.cut_short(stored.blob)
            buffer, at = buffer[count:], at + count

    def start_verify(self) -> None:
        """Begins to hash all weight blobs in threads, beside whatever the caller does next."""
        self._files.start_verify()

    def verify(self) -> None:
        """Returns once all weight blobs were hashed and hold the right bytes.

        Raises:
            DigestMismatch: one does not.
        """
        self._files.verify()

    def close(self) -> None:
        """Ends hashing and closes the files."""
        self._files.close()

    def _map(self, number: int) -> mmap.mmap:
        if number not in self._maps:
            # Copy on write: torch wants a writable buffer, and the file must not change.
            fd = self._files.file(number).fileno()
            self._maps[number] = mmap.mmap(fd, 0, access=mmap.ACCESS_COPY)
        return self._maps[number]
