"""The artifact store: blobs by content, engines by key and by selector.

`ArtifactStore` is the read side, which every backend has; `EngineStore` can be written to: a folder,
a bucket or a registry. What is inside a blob is not known here, except in `weights.py` (which needs
torch).
"""

from collections.abc import Callable
from pathlib import Path

from shared.channels import PeerSecurity
from shared.errors import InvalidField
from shared.store.artifact_store import ArtifactStore, EngineStore
from shared.store.local import LocalStore
from shared.store.pull import pull
from shared.store.remote import GrpcStore

__all__ = [
    "STORES",
    "ArtifactStore",
    "EngineStore",
    "GrpcStore",
    "LocalStore",
    "open_store",
    "pull",
]


def _s3(url: str, _: PeerSecurity) -> ArtifactStore:
    # Libraries that only these stores need are imported with them.
    from shared.store.registry import RegistryStore
    from shared.store.s3 import S3Registry

    return RegistryStore(S3Registry.from_url(url))


def _oci(url: str, _: PeerSecurity) -> ArtifactStore:
    from shared.store.oci_registry import OciRegistry
    from shared.store.registry import RegistryStore

    return RegistryStore(OciRegistry.from_url(url))


# URL scheme to backend; a URL without a scheme is a path.
STORES: dict[str, Callable[[str, PeerSecurity], ArtifactStore]] = {
    "file": lambda url, _: LocalStore.from_url(url),
    "grpc": GrpcStore.from_url,
    "s3": _s3,
    "oci": _oci,
    "oci+http": _oci,
}


def open_store(url: str, peers: PeerSecurity | None = None) -> ArtifactStore:
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
    return STORES[scheme](url, peers or PeerSecurity())
