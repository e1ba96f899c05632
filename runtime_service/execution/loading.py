"""An engine from the store onto its device: mapped, packed for this machine, verified."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import structlog
import torch

from kernels.linear.gpu import arranged, is_arranged
from runtime_service.execution.cuda_engine import assemble
from runtime_service.execution.cuda_executor import PackedWeights
from runtime_service.execution.cuda_model_runner import CudaModelRunner
from runtime_service.execution.device_stream import CudaLane, CudaStream
from runtime_service.execution.limits import choose_limits
from runtime_service.execution.machine_code import OpenLibrary, library_of
from runtime_service.execution.model_runner import ModelRunner
from runtime_service.execution.options import RunnerOptions
from runtime_service.execution.tuned import tuning_table
from runtime_service.execution.weight_copy import LANE_BYTES, NUM_LANES, WeightCopy
from runtime_service.limits import RuntimeLimits
from shared.arch import arch_named
from shared.engine import EngineManifest
from shared.errors import ArchMismatch
from shared.ir import Graph
from shared.store.local import LocalStore
from shared.store.weight_files import WeightFiles
from shared.store.weights import WeightReader

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """An engine that is ready to run steps.

    Args:
        phases: (name, seconds) of loading, in order.
    """

    runner: ModelRunner | CudaModelRunner
    limits: RuntimeLimits
    phases: tuple[tuple[str, float], ...]


def load_runner(
    store: LocalStore,
    engine: EngineManifest,
    options: RunnerOptions,
    files: WeightFiles | None = None,
    open_library: OpenLibrary | None = None,
    on_phase: Callable[[str], None] = lambda _: None,
) -> LoadedEngine:
    """The engine, loaded; nothing of it was used before all of its bytes were verified.

    Args:
        files: the engine's, where hashing them has begun already; closed by this.
        open_library: gives its machine code, where loading that has begun already.
        on_phase: called with the name of each phase that begins.
    Raises:
        ArchMismatch: it is for another kind of device.
        DigestMismatch, BlobNotFound: the store's copy is not whole.
        InvalidField: options contradict each other, the model, or the memory.
        RuntimeError: as torch and the driver say it, the GPU holds no more (`device_full`).
    """
    arch = arch_named(engine.key.arch)
    phases = _Phases(on_phase)
    if arch.is_gpu:
        if not torch.cuda.is_available():
            command = "millrace-runtime --arch cpu"
            raise ArchMismatch(built_for=arch.name, found="cpu", command=command)
        open_library = open_library or library_of(store, engine)
        return _load_cuda_runner(store, engine, options, files, open_library, phases)
    return _load_cpu_runner(store, engine, options, files, phases)


def _load_cpu_runner(
    store: LocalStore,
    engine: EngineManifest,
    options: RunnerOptions,
    files: WeightFiles | None,
    phases: "_Phases",
) -> LoadedEngine:
    # Not at the head: a GPU's engine process needs none of it, and it takes a third of a second.
    from kernels.cpu_form import cpu_target
    from kernels.cpu_jit import CACHE_FOLDER, set_num_threads
    from kernels.sampling.cpu import draw_tokens
    from runtime_service.execution.cpu_executor import CpuExecutor

    set_num_threads(options.num_threads or 0)
    with WeightReader(store, engine, files) as reader:
        reader.start_verify()
        with phases.timed("read_graph"):
            graph = read_graph(store, engine)
        target = cpu_target(graph)
        free_bytes = max(psutil.virtual_memory().available - 2 * reader.num_bytes, 0)
        limits = choose_limits(graph, free_bytes, options)
        with phases.timed("pack_weights"):
            executor = CpuExecutor(
                graph, reader.roles, target, limits.num_blocks, limits.block_tokens
            )
        with phases.timed("verify_weights"):
            reader.verify()
    _log.info(
        "engine_loaded",
        engine=engine.name,
        activations=target.name,
        activations_reason=target.reason,
        kernel_cache=None if CACHE_FOLDER is None else str(CACHE_FOLDER),
        kv_bytes=limits.kv_bytes,
        kv_reason=limits.kv_reason,
        max_sequence_tokens=limits.max_sequence_tokens,
        max_sequences=limits.max_sequences,
    )
    vocab_size = int(str(graph.config["vocab_size"]))
    runner = ModelRunner(
        executor,
        limits,
        vocab_size,
        lambda: set_num_threads(options.num_threads or 0),
        executor.preparations(limits.max_step_tokens),
        draw_tokens,
    )
    return LoadedEngine(runner, limits, phases.timings)


def read_graph(store: LocalStore, engine: EngineManifest) -> Graph:
    """The graph that the engine runs."""
    return Graph.from_json(store.read_all(engine.layer("graph.json").digest).decode())


def as_kernels_read(graph: Graph, copy: WeightCopy) -> PackedWeights:
    """The weights on the device in the order of its kernels. One that is to be arranged has to be there first."""
    if not any(is_arranged(spec) for spec in graph.weights.values()):
        return copy.weights
    copy.join()
    weights = {n: arranged(spec, copy.weights.pop(n)) for n, spec in graph.weights.items()}
    torch.cuda.empty_cache()  # what is free decides how large the KV cache is
    return weights


def _load_cuda_runner(
    store: LocalStore,
    engine: EngineManifest,
    options: RunnerOptions,
    files: WeightFiles | None,
    open_library: OpenLibrary,
    phases: "_Phases",
) -> LoadedEngine:
    graph = read_graph(store, engine)
    with WeightReader(store, engine, files) as reader:
        reader.start_verify()  # beside all that follows
        with phases.timed("device_context"):
            stream = CudaStream()
        with phases.timed("check_device"):
            library = open_library()
            gpu = torch.cuda.get_device_name()
            table = tuning_table(store, engine, graph, library, gpu)
        with phases.timed("start_copy"):
            lanes = [CudaLane(LANE_BYTES) for _ in range(NUM_LANES)]
            copy = WeightCopy(reader, graph.weights, stream.device, lanes)
        # Kernels are loaded and graphs captured while weights arrive: neither reads a result.
        with copy:
            with phases.timed("load_kernels"):
                loaded = assemble(
                    graph, library, as_kernels_read(graph, copy), options, stream,
                    lambda: torch.cuda.mem_get_info()[0], table,
                )  # fmt: skip
            with phases.timed("capture_graphs"):
                loaded.graphs.capture_few()
            with phases.timed("copy_weights"):
                copy.join()
        with phases.timed("verify_weights"):
            reader.verify()
    limits = loaded.limits
    _log.info(
        "engine_loaded",
        engine=engine.name,
        device=gpu,
        tuned_sites=len(table),
        captured_graphs=loaded.graphs.num_graphs,
        kv_bytes=limits.kv_bytes,
        kv_reason=limits.kv_reason,
        max_sequence_tokens=limits.max_sequence_tokens,
        max_sequences=limits.max_sequences,
    )
    return LoadedEngine(loaded.runner, limits, phases.timings)


class _Phases:
    def __init__(self, on_phase: Callable[[str], None]) -> None:
        self._on_phase = on_phase
        self._timings: list[tuple[str, float]] = []

    @property
    def timings(self) -> tuple[tuple[str, float], ...]:
        return tuple(self._timings)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        self._on_phase(name)
        started = time.monotonic()
        yield
        self._timings.append((name, time.monotonic() - started))
