"""The artifact store: blobs by content, engines by key and by selector.

`ArtifactStore` is the read side, which every backend has; `LocalStore` alone can be written to.
What is inside a blob is not known here, except in `weights.py` (which needs torch).
"""

from collections.abc import Callable

from shared.channels import PeerSecurity
from shared.errors import InvalidField
from shared.store.artifact_store import ArtifactStore
from shared.store.local import LocalStore
from shared.store.pull import pull
from shared.store.remote import GrpcStore

__all__ = ["STORES", "ArtifactStore", "GrpcStore", "LocalStore", "open_store", "pull"]

# URL scheme to backend; a URL without a scheme is a path.
STORES: dict[str, Callable[[str, PeerSecurity], ArtifactStore]] = {
    "file": lambda url, _: LocalStore.from_url(url),
    "grpc": GrpcStore.from_url,
}


def open_store(url: str, peers: PeerSecurity | None = None) -> ArtifactStore:
    """The store at `url`: a path, `file:///path`, or `grpc://host:port`.

    Args:
        peers: how another daemon is called.
    Raises:
        InvalidField: no backend has the URL's scheme.
    """
    scheme, separator, _ = url.partition("://")
    if not separator:
        return LocalStore(url)
    if scheme not in STORES:
        known = ", ".join(f"{name}://" for name in STORES)
        raise InvalidField(field="store", problem=f"{url!r} is neither a path nor one of {known}")
    return STORES[scheme](url, peers or PeerSecurity())
