"""An engine's machine code from the store onto the device; without torch, which is imported meanwhile."""

from collections.abc import Callable

from kernels.launcher import KernelLibrary
from kernels.variant import CODE_TITLE, INDEX_TITLE
from shared.engine import EngineManifest
from shared.store.local import LocalStore

OpenLibrary = Callable[[], KernelLibrary]


def library_of(store: LocalStore, engine: EngineManifest) -> OpenLibrary:
    """What opens the engine's machine code, which is read now, on the current device.

    Raises:
        DigestMismatch, BlobNotFound: the store's copy is not whole.
    """
    code = store.read_all(engine.layer(CODE_TITLE).digest)
    index = store.read_all(engine.layer(INDEX_TITLE).digest)
    return lambda: KernelLibrary(index, lambda offset, size: code[offset : offset + size])


def load_library(store: LocalStore, engine: EngineManifest) -> KernelLibrary:
    """The engine's machine code, all of it loaded; also makes the device's context.

    Raises:
        ArchMismatch, DriverTooOld: it is for another device.
        DigestMismatch, BlobNotFound: as `library_of`.
    """
    library = library_of(store, engine)()
    library.load_all()
    return library
