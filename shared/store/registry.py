"""What the OCI distribution spec knows: blobs and manifests by digest, manifests by tag.

`oci_registry.py` is such a registry over HTTP, `s3.py` makes one of a bucket; `registry_store.py` keeps engines in
either.
"""

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from shared.engine import Blob
from shared.errors import StoreUnreachable
from shared.store import oci
from shared.store.blobs import Sweep

# An index that many change at once: each change takes a few requests.
_MAX_CHANGES, _CHANGE_WAIT_S = 60, 0.5

Manifest = tuple[Blob, bytes]


class TagMoved(Exception):
    """Somebody else gave the tag another manifest meanwhile."""


class Registry(Protocol):
    """Blobs and manifests by digest, manifests by tag. All methods block, in any thread.

    Every method raises StoreUnreachable, StoreRefused or StoreNotFound where that is the case.
    """

    @property
    def url(self) -> str:
        """Where it is, for people: no secret."""

    @property
    def settle_s(self) -> float:
        """How long a slower writer may still undo a change of a tag; 0: `replaces` is exact."""

    def check(self) -> None:
        """Returns if it answers and takes our credentials."""

    def has(self, digest: str) -> bool:
        """Claims that the blob is there."""

    def adopt(self, digest: str) -> bool:
        """Claims that the blob is there, and no sweep takes it for as long as a new one."""

    def read(self, digest: str, offset: int = 0) -> Iterator[bytes]:
        """A blob's bytes from `offset` on, unverified; BlobNotFound where there is none."""

    def upload(self, blob: Blob, content: Path | bytes) -> None:
        """Puts the blob there, whole or not at all."""

    def manifest(self, reference: str) -> Manifest | None:
        """The manifest or index that a tag or a digest names, unverified."""

    def put_manifest(
        self, content: bytes, media_type: str, tag: str = "", replaces: str | None = None
    ) -> Blob:
        """Puts a manifest there, and gives it the tag if one is named.

        Raises:
            TagMoved: the tag names another manifest than that of the digest `replaces`; None: any.
        """

    def tags(self) -> tuple[str, ...]:
        """All tags."""

    def delete_manifest(self, digest: str) -> None:
        """Removes the manifest, if it is there, and the tags that name it."""

    def sweep(self, grace_s: float) -> Sweep:
        """Removes blobs that no tag leads to and that are older than `grace_s`.

        Raises:
            StoreRefused: that is the registry's own to do.
        """


def change_tag(
    registry: Registry, tag: str, change: Callable[[bytes | None], bytes | None]
) -> None:
    """Gives the tag the index that `change` makes of its own, None being no index.

    It looks again at what it did: `change` gives what it is given once there is nothing to do.
    Where an update is not conditional it looks once more later: whoever had looked before this
    wrote has then written, and what that undid is done again, on top of it.

    Raises:
        StoreUnreachable: others change it all the time.
    """
    is_settled = True
    for _ in range(_MAX_CHANGES):
        found = registry.manifest(tag)
        old, digest = (None, None) if found is None else (found[1], found[0].digest)
        new = change(old)
        if new == old and is_settled:
            return
        if new == old:
            is_settled = True
            time.sleep(registry.settle_s * random.uniform(1.0, 1.5))
            continue
        is_settled = registry.settle_s == 0
        try:
            if new is not None:
                registry.put_manifest(new, oci.INDEX_TYPE, tag, replaces=digest)
            elif digest is not None:
                registry.delete_manifest(digest)
        except TagMoved:
            time.sleep(random.uniform(0, _CHANGE_WAIT_S))
    raise StoreUnreachable(store=registry.url, problem=f"others keep changing the tag {tag}")
