"""What a machine keeps of a store elsewhere: a `LocalStore` of limited size.

Engines that were not used for longest make room for new ones, never one that a process holds. Room
is made, and filled, by one process at a time, so that the limit holds whoever else pulls.
"""

from shared.engine import EngineManifest
from shared.errors import CacheTooSmall
from shared.store.artifact_store import ArtifactStore
from shared.store.local import LocalStore
from shared.store.locks import FileLock
from shared.store.pins import Pin
from shared.store.pull import Report, pull


class EngineCache:
    """Engines of other stores in `local`.

    Args:
        max_bytes: blobs, and parts of blobs, that it may hold; 0: any number.
    """

    def __init__(self, local: LocalStore, max_bytes: int) -> None:
        self.local, self.max_bytes = local, max_bytes

    def hold(self, engine: EngineManifest) -> Pin:
        """Keeps the engine here until the pin is released or this process ends; it is used now.

        Raises:
            EngineNotFound: it is not here any more.
        """
        return self.local.hold(engine)

    def pull(
        self,
        source: ArtifactStore,
        engine: EngineManifest,
        report: Report | None = None,
        instead: EngineManifest | None = None,
    ) -> EngineManifest:
        """The engine, complete and verified here; others may have gone for it.

        Args:
            report, instead: as of `shared.store.pull`.
        Raises:
            CacheTooSmall: it does not fit beside what is held.
            MillraceError: see `shared.store.pull`.
        """
        if self.max_bytes == 0:
            return pull(source, engine, self.local, report, instead)
        with self._alone(), self.local.pin() as pin:
            for blob in engine.layers:
                pin.add(blob.digest)  # so that making room leaves what is here of them
            self._make_room(engine)
            return pull(source, engine, self.local, report, instead)

    def trim(self) -> None:
        """Lets go of engines until the limit holds again, or what is left is held."""
        if self.max_bytes:
            with self._alone():
                self._shrink_to(self.max_bytes)

    def _alone(self) -> FileLock:
        return FileLock(self.local.root / "locks" / "cache")

    def _make_room(self, engine: EngineManifest) -> None:
        sizes = {blob.digest: blob.size_bytes for blob in (engine.manifest, *engine.layers)}
        needed = sum(sizes.values())
        missing = needed - sum(self.local.blobs.num_bytes(digest) for digest in sizes)
        # What no eviction frees: where that is too much, nobody goes in vain.
        used = self.local.blobs.pinned_bytes()
        if used + missing <= self.max_bytes:
            used = self._shrink_to(self.max_bytes - missing)
        if used + missing > self.max_bytes:
            raise CacheTooSmall(
                engine=engine.name,
                needed_bytes=needed,
                cache_bytes=self.max_bytes,
                used_bytes=used + missing - needed,
            )

    def _shrink_to(self, max_bytes: int) -> int:
        """How many bytes are left here: at most `max_bytes`, if that can be."""
        used = self.local.blobs.total_bytes()
        if used <= max_bytes:
            return used
        self.local.sweep(grace_s=0)
        oldest_first = sorted(self.local.list(), key=self.local.last_used_s)
        for engine in oldest_first:
            used = self.local.blobs.total_bytes()
            if used <= max_bytes:
                return used
            if self.local.evict(engine):
                self.local.sweep(grace_s=0)
        return self.local.blobs.total_bytes()
