"""A build for a store elsewhere: made in a folder of this machine, then pushed.

What of its weights another arch's engine has in that store is fetched instead of made: then two
machines share them even where their last bits would differ.
"""

import structlog

from compiler_service.builder import (
    BuildCancelled,
    BuildRequest,
    IsCancelled,
    Report,
    build,
)
from compiler_service.fingerprints import share_weights
from compiler_service.progress import BuildProgress
from shared.engine import EngineKey, EngineManifest
from shared.store.cache import EngineCache
from shared.store.pull import pull
from shared.store.registry_store import RegistryStore

PUSH = "push"

log = structlog.get_logger()


def build_into(
    store: RegistryStore,
    cache: EngineCache,
    request: BuildRequest,
    report: Report,
    is_cancelled: IsCancelled = lambda: False,
) -> EngineManifest:
    """The engine of `request.key` in `store`: built and pushed, or the one that is there already.

    Args:
        cache: where it is built, and where it stays while there is room.
    Raises:
        BuildCancelled: `is_cancelled` said so.
        MillraceError: the build failed, or the push; asked again it goes on with what there is.
    """

    def go_on(done: int, total: int) -> None:
        if is_cancelled():
            raise BuildCancelled
        report(BuildProgress(PUSH, 1.0, done, total))

    _fetch_weights(store, cache, request.key)
    engine = build(request, cache.local, report, is_cancelled)
    held = cache.hold(engine)
    try:
        pushed = store.push(cache.local, engine, go_on)
        if pushed.model != request.model:
            store.add_model_name(pushed, request.model)
        if pushed.manifest != engine.manifest:  # another worker's was first
            cache.local.delete(engine.name)
    finally:
        held.release()
    cache.trim()
    return pushed


def _fetch_weights(store: RegistryStore, cache: EngineCache, key: EngineKey) -> None:
    def is_sibling(engine: EngineManifest) -> bool:
        return share_weights(engine.key, key)

    if any(map(is_sibling, cache.local.list())):
        return
    for engine in filter(is_sibling, store.list()):
        log.info("weights_fetched", engine=engine.name, store=store.url)
        pull(store, engine, cache.local)  # its room is looked at when the build has ended
        return
