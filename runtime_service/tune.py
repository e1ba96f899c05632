"""`python -m runtime_service.tune`: measures an engine on this machine's GPU, and keeps the record in the store.

What `millrace tune` runs. It takes a runtime's settings, for it finds engines as a runtime does, and says what it finds
in lines of JSON: `{"site": ...}` as each is known, at last `{"record": ..., "published": [...]}`.
"""

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any

import msgspec

from runtime_service.daemon import open_stores
from runtime_service.device import gpu_capability, own_arch
from runtime_service.engine_source import EngineSource
from runtime_service.settings import RuntimeSettings, quant_named
from shared.arch import arch_named
from shared.engine import EngineManifest, EngineSelector
from shared.errors import EngineNotFound, MillraceError
from shared.log import configure_logging
from shared.security import peer_security
from shared.settings import SettingsError, exit_with
from shared.signing import TrustedKeys
from shared.store import ArtifactStore, LocalStore
from shared.tuning import TunedSite, TuningRecord, record_to_json

# Of an engine in the local store; calls what it is given with each site.
TuneEngine = Callable[[LocalStore, EngineManifest, Callable[[TunedSite], None]], TuningRecord]


def main() -> None:
    """Measures the engine of this process's settings."""
    settings = RuntimeSettings.load()
    configure_logging(settings.log_level, settings.log_format, "tune")
    try:
        run(settings, _say, _tune_engine)
    except SettingsError as error:
        exit_with(f"millrace tune: {error}")
    except MillraceError as error:
        sys.exit(f"millrace tune: {error}")


def run(
    settings: RuntimeSettings, say: Callable[[dict[str, Any]], None], tune_engine: TuneEngine
) -> None:
    """Finds the engine, measures it, and publishes the record wherever the engine came from.

    Raises:
        SettingsError: no model is named, or it is for no GPU of this machine.
        MillraceError: the engine cannot be had, loaded or measured, or the store does not take the record.
    """
    if not settings.model:
        raise SettingsError("--model says which engine is measured")
    arch = settings.arch or own_arch()
    if not arch_named(arch).is_gpu:
        raise SettingsError("there is no NVIDIA GPU here; engines for cpu have nothing to choose")
    peers = peer_security(settings)
    peers.check(settings.compiler)
    trusted = None if settings.trusted_keys is None else TrustedKeys.load(settings.trusted_keys)
    local, remote, cache = open_stores(settings, peers)
    source = EngineSource(local, remote, settings.compiler, peers, trusted, cache)
    selector = EngineSelector(settings.model, arch, quant_named(settings.quant))
    engine = asyncio.run(source.find(selector, settings.model_uri, lambda: None))
    let_go = source.hold(engine)
    try:
        record = tune_engine(local, engine, lambda site: say({"site": msgspec.to_builtins(site)}))
        published = publish(engine, record, local, remote)
    finally:
        let_go()
    say({"record": msgspec.to_builtins(record), "engine": engine.name, "published": published})


def publish(
    engine: EngineManifest, record: TuningRecord, local: LocalStore, remote: ArtifactStore | None
) -> list[str]:
    """Keeps the record with the engine here, and where it came from; gives where.

    Raises:
        MillraceError: a store does not take it; those before it have it.
    """
    text = record_to_json(record)
    local.add_tuning(engine, record.gpu, text)
    if remote is None:
        return ["local"]
    try:
        remote.add_tuning(engine, record.gpu, text)
    except EngineNotFound:  # it was never there, or has been deleted meanwhile
        return ["local"]
    return ["local", "remote"]


def _say(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def _tune_engine(
    local: LocalStore, engine: EngineManifest, on_site: Callable[[TunedSite], None]
) -> TuningRecord:
    if gpu_capability() is None:
        raise SettingsError("there is no NVIDIA GPU here to measure on")
    # Only now: torch takes seconds, and what is wrong before is told at once.
    from runtime_service.execution.tune_engine import tune_engine

    return tune_engine(local, engine, on_site)


if __name__ == "__main__":
    main()
