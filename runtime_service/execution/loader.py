"""What an engine process runs to load its engine, beside the import of torch, which takes seconds.

That import may go on in another thread, and two threads that import the same modules can fail for each other's
locks: so `loading`, which reaches torch, is the one module that is imported here after the head.
"""

import gc
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from runtime_service.execution.machine_code import load_library
from runtime_service.execution.options import RunnerOptions
from shared.arch import arch_named
from shared.errors import DigestMismatch
from shared.store.local import LocalStore
from shared.store.weight_files import WeightFiles

if TYPE_CHECKING:
    from runtime_service.execution.loading import LoadedEngine


def import_ahead() -> None:
    """Imports what every engine needs; for a thread of a process that waits for what to load."""
    gc.disable()  # imports make no garbage to speak of, and looking for it is a tenth of their time
    try:
        import runtime_service.execution.loading  # noqa: F401 - to have it
    finally:
        gc.enable()
    gc.freeze()  # a collection while the engine is loaded would walk all of it, 0.2 s each time


def load_engine(
    store: str,
    engine: str,
    manifest: str = "",
    max_sequence_tokens: int | None = None,
    max_sequences: int | None = None,
    max_step_tokens: int | None = None,
    kv_bytes: int | None = None,
    num_threads: int | None = None,
    on_phase: Callable[[str], None] = lambda _: None,
) -> "LoadedEngine":
    """The engine, ready to run steps; everything is by name, so that it crosses a process border.

    Args:
        store: folder of a local store that holds the engine whole.
        engine: its name.
        manifest: digest of the manifest that was found by that name and checked; "": whichever it names now. Between
            the check and a load, or a restart, the name may have become another engine's.
        on_phase: called with the name of each phase that begins.
    Raises:
        EngineNotFound: there is none of that name.
        DigestMismatch: the name is another manifest's; else as `load_runner`.
    """
    local = LocalStore(Path(store))
    found = local.get(engine)
    if manifest and found.manifest.digest != manifest:
        raise DigestMismatch(digest=manifest, found=found.manifest.digest)
    began = time.monotonic()
    on_phase("import_torch")
    with WeightFiles(local, found) as files, ThreadPoolExecutor(1, "load-kernels") as ahead:
        files.start_verify()
        is_gpu = arch_named(found.key.arch).is_gpu
        code = ahead.submit(load_library, local, found) if is_gpu else None
        import_ahead()
        from runtime_service.execution.loading import load_runner

        imported = ("import_torch", time.monotonic() - began)
        options = RunnerOptions(
            max_sequence_tokens, max_sequences, max_step_tokens, kv_bytes, num_threads
        )
        open_library = code.result if code else None
        loaded = load_runner(local, found, options, files, open_library, on_phase)
    return replace(loaded, phases=(imported, *loaded.phases))
