"""An engine from the local store onto this machine's GPU, and every choice of its kernels measured there."""

import importlib.metadata
from collections.abc import Callable
from datetime import UTC, datetime

import torch

from runtime_service.device_full import device_full
from runtime_service.execution.device_stream import CudaLane, CudaStream
from runtime_service.execution.loading import as_kernels_read, read_graph
from runtime_service.execution.machine_code import library_of
from runtime_service.execution.step_timer import CudaClock, StepTimer, fitting_steps
from runtime_service.execution.tuner import tune
from runtime_service.execution.weight_copy import LANE_BYTES, NUM_LANES, WeightCopy
from shared.engine import EngineManifest
from shared.store.local import LocalStore
from shared.store.weights import WeightReader
from shared.tuning import TunedSite, TuningRecord


def tune_engine(
    store: LocalStore, engine: EngineManifest, on_site: Callable[[TunedSite], None]
) -> TuningRecord:
    """What was measured; nothing of the engine was used before all of its bytes were verified.

    Args:
        on_site: called with each site as it is known.
    Raises:
        ArchMismatch, DriverTooOld: the engine is for another device.
        DigestMismatch, BlobNotFound: the store's copy is not whole.
        InvalidField, DeviceFull: the GPU has too little free memory.
    """
    with device_full(engine.name):
        return _tune(store, engine, on_site)


def _tune(
    store: LocalStore, engine: EngineManifest, on_site: Callable[[TunedSite], None]
) -> TuningRecord:
    graph, open_library = read_graph(store, engine), library_of(store, engine)
    with WeightReader(store, engine) as reader:
        reader.start_verify()
        stream, library = CudaStream(), open_library()
        lanes = [CudaLane(LANE_BYTES) for _ in range(NUM_LANES)]
        with WeightCopy(reader, graph.weights, stream.device, lanes) as copy:
            weights = as_kernels_read(graph, copy)
            copy.join()
        reader.verify()
    steps = fitting_steps(graph, torch.cuda.mem_get_info()[0])
    timer = StepTimer(graph, library, weights, stream, CudaClock(), steps)
    with torch.inference_mode():
        sites = tune(graph, library.arch, timer, on_site)
    return record_of(engine, torch.cuda.get_device_name(), sites)


def record_of(engine: EngineManifest, gpu: str, sites: tuple[TunedSite, ...]) -> TuningRecord:
    """What was measured of `engine` just now, by this version."""
    return TuningRecord(
        gpu=gpu,
        arch=engine.key.arch,
        engine=engine.manifest.digest,
        builder=engine.key.builder,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        measured_by=f"millrace {importlib.metadata.version('millrace-server')}, torch {torch.__version__}",
        sites=sites,
    )
