"""The seam between an engine's readers and where engines are kept."""

from collections.abc import Iterator
from typing import Protocol

from shared.engine import EngineManifest, EngineSelector, Signature


class ArtifactStore(Protocol):
    """What readers see of a store, and the one thing that they add: what they measured.

    All methods block; a store may be used from several threads.
    """

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

    def add_tuning(self, engine: EngineManifest, gpu: str, record: bytes) -> EngineManifest:
        """Keeps a GPU's tuning record with the engine, in the place of an older one; gives it with all that it has.

        Raises:
            EngineNotFound: it has gone.
        """


class EngineStore(ArtifactStore, Protocol):
    """A store whose engines can also be named, signed and deleted: what a compile daemon works on.

    New engines get into it by their backend: `LocalStore.publish`, `RegistryStore.push`.
    """

    @property
    def url(self) -> str:
        """Where it is, as `open_store` and people know it: no secret."""

    def check(self) -> None:
        """Returns if the store is there and takes our credentials.

        Raises:
            StoreUnreachable, StoreRefused, StoreNotFound: it is not, or does not.
        """

    def add_model_name(self, engine: EngineManifest, model: str) -> None:
        """Lets selectors find the engine by this model name too."""

    def add_signature(self, engine: EngineManifest, signature: Signature) -> EngineManifest:
        """Keeps a signature with the engine, once; gives it with all that it has.

        Raises:
            EngineNotFound: it has gone.
        """

    def delete(self, name: str) -> EngineManifest:
        """Removes the engine's names; gives what it was.

        Raises:
            EngineNotFound: there is none.
        """
