"""What an engine process runs to load its engine: hashing begins first, as importing torch takes seconds."""

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from shared.store.local import LocalStore
from shared.store.weight_files import WeightFiles

if TYPE_CHECKING:
    from runtime_service.execution.loading import LoadedEngine


def load_engine(
    store: str,
    engine: str,
    max_sequence_tokens: int | None = None,
    max_sequences: int | None = None,
    max_step_tokens: int | None = None,
    kv_bytes: int | None = None,
    num_threads: int | None = None,
) -> "LoadedEngine":
    """The engine, ready to run steps; everything is by name, so that it crosses a process border.

    Args:
        store: folder of a local store that holds the engine whole.
        engine: its name.
    Raises:
        what `load_runner` does.
    """
    local = LocalStore(Path(store))
    manifest = local.get(engine)
    began = time.monotonic()
    with WeightFiles(local, manifest) as files:
        files.start_verify()
        from runtime_service.execution.limits import RunnerOptions
        from runtime_service.execution.loading import load_runner

        imported = ("import_torch", time.monotonic() - began)
        options = RunnerOptions(
            max_sequence_tokens, max_sequences, max_step_tokens, kv_bytes, num_threads
        )
        loaded = load_runner(local, manifest, options, files)
    return replace(loaded, phases=(imported, *loaded.phases))
