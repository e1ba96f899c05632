"""An engine from the store onto its device: mapped, packed for this machine, verified."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import structlog
import torch

from kernels.launcher import KernelLibrary
from kernels.variant import CODE_TITLE, INDEX_TITLE
from runtime_service.execution.cuda_engine import assemble
from runtime_service.execution.cuda_model_runner import CudaModelRunner
from runtime_service.execution.device_stream import CudaStream
from runtime_service.execution.limits import RunnerOptions, choose_limits
from runtime_service.execution.model_runner import ModelRunner
from runtime_service.limits import RuntimeLimits
from shared.arch import arch_named
from shared.engine import EngineManifest
from shared.errors import ArchMismatch
from shared.ir import Graph
from shared.store.local import LocalStore
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


def load_engine(
    store: str,
    engine: str,
    max_sequence_tokens: int | None = None,
    max_sequences: int | None = None,
    max_step_tokens: int | None = None,
    kv_bytes: int | None = None,
    num_threads: int | None = None,
) -> LoadedEngine:
    """What an engine process runs: everything by name, so that it crosses a process border.

    Args:
        store: folder of a local store that holds the engine whole.
        engine: its name.
    Raises:
        what `load_runner` does.
    """
    local = LocalStore(Path(store))
    options = RunnerOptions(
        max_sequence_tokens, max_sequences, max_step_tokens, kv_bytes, num_threads
    )
    return load_runner(local, local.get(engine), options)


def load_runner(store: LocalStore, engine: EngineManifest, options: RunnerOptions) -> LoadedEngine:
    """The engine, loaded; nothing of it was used before all of its bytes were verified.

    Raises:
        ArchMismatch: it is for another kind of device.
        DigestMismatch, BlobNotFound: the store's copy is not whole.
        InvalidField: options contradict each other, the model, or the memory.
    """
    arch = arch_named(engine.key.arch)
    phases = _Phases()
    if arch.is_gpu:
        if not torch.cuda.is_available():
            command = "millrace-runtime --arch cpu"
            raise ArchMismatch(built_for=arch.name, found="cpu", command=command)
        return _load_cuda_runner(store, engine, options, phases)
    return _load_cpu_runner(store, engine, options, phases)


def _load_cpu_runner(
    store: LocalStore, engine: EngineManifest, options: RunnerOptions, phases: "_Phases"
) -> LoadedEngine:
    # Not at the head: a GPU's engine process needs none of it, and it takes a third of a second.
    from kernels.cpu_form import cpu_target
    from kernels.cpu_jit import CACHE_FOLDER, set_num_threads
    from runtime_service.execution.cpu_executor import CpuExecutor

    set_num_threads(options.num_threads or 0)
    with WeightReader(store, engine) as reader:
        reader.start_verify()
        with phases.timed("read_graph"):
            graph = Graph.from_json(store.read_all(engine.layer("graph.json").digest).decode())
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
        executor, limits, vocab_size, lambda: set_num_threads(options.num_threads or 0)
    )
    return LoadedEngine(runner, limits, phases.timings)


def _load_cuda_runner(
    store: LocalStore, engine: EngineManifest, options: RunnerOptions, phases: "_Phases"
) -> LoadedEngine:
    code = store.read_all(engine.layer(CODE_TITLE).digest)
    with phases.timed("check_device"):
        library = KernelLibrary(
            store.read_all(engine.layer(INDEX_TITLE).digest),
            lambda offset, size: code[offset : offset + size],
        )
    graph = Graph.from_json(store.read_all(engine.layer("graph.json").digest).decode())
    with WeightReader(store, engine) as reader:
        reader.start_verify()
        with phases.timed("copy_weights"):
            weights = {
                name: {role: tensor.cuda() for role, tensor in reader.roles(name).items()}
                for name in graph.weights
            }
        with phases.timed("verify_weights"):
            reader.verify()
    with phases.timed("load_kernels"):
        loaded = assemble(
            graph, library, weights, options, CudaStream(), lambda: torch.cuda.mem_get_info()[0]
        )
    with phases.timed("capture_graphs"):
        loaded.graphs.capture()
    limits = loaded.limits
    _log.info(
        "engine_loaded",
        engine=engine.name,
        device=torch.cuda.get_device_name(),
        captured_graphs=loaded.graphs.num_graphs,
        kv_bytes=limits.kv_bytes,
        kv_reason=limits.kv_reason,
        max_sequence_tokens=limits.max_sequence_tokens,
        max_sequences=limits.max_sequences,
    )
    return LoadedEngine(loaded.runner, limits, phases.timings)


class _Phases:
    def __init__(self) -> None:
        self._timings: list[tuple[str, float]] = []

    @property
    def timings(self) -> tuple[tuple[str, float], ...]:
        return tuple(self._timings)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self._timings.append((name, time.monotonic() - started))
