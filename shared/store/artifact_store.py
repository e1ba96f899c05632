"""The seam between an engine's readers and where engines are kept."""

from collections.abc import Iterator
from typing import Protocol

from shared.engine import EngineManifest, EngineSelector


class ArtifactStore(Protocol):
    """The read side of a store. All methods block; a store may be used from several threads."""

    def find(self, selector: EngineSelector, max_format: int = 0) -> EngineManifest | None:
        """The newest engine that fits, None where there is none.

        Args:
            selector: `model` is a model's name or its digest.
            max_format: newest format version that the caller reads; 0 means any.
        """

    def get(self, name: str) -> EngineManifest:
        """The engine of that name.

        Args:
            name: `engines/<digest>`, the bare digest, or a unique prefix of at least 6 characters.
        Raises:
            EngineNotFound: there is none, or several begin so.
        """

    def list(self) -> tuple[EngineManifest, ...]:
        """All engines, newest first."""

    def read(self, digest: str, offset: int = 0) -> Iterator[bytes]:
        """A blob's bytes from `offset` on, in pieces of at most 1 MiB.

        Raises:
            BlobNotFound: there is none.
            DigestMismatch: the store's copy is corrupt.
            InvalidField: a malformed digest, or an offset past the end.
        """
