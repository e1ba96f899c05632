"""The artifact store: blobs by content, engines by key and by selector.

`ArtifactStore` is the read side, which every backend has; `EngineStore` can be written to: a folder,
a bucket or a registry. What is inside a blob is not known here, except in `weights.py` (which needs
torch).
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from shared.errors import InvalidField
from shared.store.artifact_store import ArtifactStore, EngineStore
from shared.store.local import LocalStore
from shared.store.pull import pull

if TYPE_CHECKING:
    from shared.channels import PeerSecurity

__all__ = [
    "STORES",
    "ArtifactStore",
    "EngineStore",
    "LocalStore",
    "open_store",
    "pull",
]


# What only these stores need is imported with them: an engine process, which reads a folder alone, starts sooner.
def _grpc(url: str, peers: "PeerSecurity | None") -> ArtifactStore:
    from shared.channels import PeerSecurity
    from shared.store.remote import GrpcStore

    return GrpcStore.from_url(url, peers or PeerSecurity())


def _s3(url: str, _: "PeerSecurity | None") -> ArtifactStore:
    from shared.store.registry_store import RegistryStore
    from shared.store.s3 import S3Registry

    return RegistryStore(S3Registry.from_url(url))


def _oci(url: str, _: "PeerSecurity | None") -> ArtifactStore:
    from shared.store.oci_registry import OciRegistry
    from shared.store.registry_store import RegistryStore

    return RegistryStore(OciRegistry.from_url(url))


# URL scheme to backend; a URL without a scheme is a path.
STORES: dict[str, Callable[[str, "PeerSecurity | None"], ArtifactStore]] = {
    "file": lambda url, _: LocalStore.from_url(url),
    "grpc": _grpc,
    "s3": _s3,
    "oci": _oci,
    "oci+http": _oci,
}


def open_store(url: str, peers: "PeerSecurity | None" = None) -> ArtifactStore:
    """The store at `url`; nothing is asked of one that is elsewhere.

    Args:
        url: a path, `file:///path`, `grpc://host:port`, `s3://bucket/prefix`, `oci://host/name`, or
            `oci+http://host/name` for a registry without TLS.
        peers: how another daemon is called.
    Raises:
        InvalidField: no backend has the URL's scheme, or it is not of that backend's form.
    """
    scheme, separator, _ = url.partition("://")
    if not separator:
        return LocalStore(Path(url).expanduser())
    if scheme not in STORES:
        known = ", ".join(f"{name}://" for name in STORES)
        raise InvalidField(field="store", problem=f"{url!r} is neither a path nor one of {known}")
    return STORES[scheme](url, peers)
