"""The parts of the GPU path, put together for one engine on one device."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from kernels.attention.launch import shares_of
from kernels.launch import Sizes
from kernels.launcher import KernelLibrary
from kernels.regimes import REGIMES
from kernels.tuning import BUILT_IN, TuningTable
from runtime_service.execution.cuda_executor import CudaExecutor, PackedWeights
from runtime_service.execution.cuda_graphs import CudaGraphExecutor, rope_bytes
from runtime_service.execution.cuda_model_runner import CudaModelRunner
from runtime_service.execution.device_rows import DeviceRows
from runtime_service.execution.device_sampler import DeviceSampler, sampler_scratch
from runtime_service.execution.device_stream import DeviceStream
from runtime_service.execution.limits import GPU_DEFAULTS, choose_limits, step_tokens
from runtime_service.execution.options import RunnerOptions
from runtime_service.limits import RuntimeLimits
from shared.ir import Graph

# A step that wants all logits is cut into pieces of as many tokens as can be drawn for, and not of fewer than this.
_MIN_LOGIT_ROWS = 64


@dataclass(frozen=True, slots=True)
class CudaEngine:
    """An engine on its device; `graphs.capture()` is still to be called."""

    runner: CudaModelRunner
    graphs: CudaGraphExecutor
    rows: DeviceRows
    limits: RuntimeLimits


def assemble(
    graph: Graph,
    library: KernelLibrary,
    weights: PackedWeights,
    options: RunnerOptions,
    stream: DeviceStream,
    free_bytes: Callable[[], int],
    table: TuningTable = BUILT_IN,
) -> CudaEngine:
    """Allocates all: activations and what draws take, then the KV cache from what is free, then tables and inputs.

    Args:
        free_bytes: of the device's memory, at the time that it is called.
        table: what takes the place of built-in choices of kernels.
    Raises:
        InvalidField: as `choose_limits`.
    """
    max_sequences = options.max_sequences or GPU_DEFAULTS.max_sequences
    max_step_tokens = step_tokens(options, GPU_DEFAULTS)
    logit_rows = min(max_step_tokens, max(max_sequences, _MIN_LOGIT_ROWS))
    block_tokens = options.block_tokens or GPU_DEFAULTS.block_tokens
    regimes = [replace(r, block_tokens=block_tokens) for r in REGIMES]
    sizes = Sizes(max_step_tokens, max_sequences, logit_rows)
    executor = CudaExecutor(graph, library, weights, sizes)
    executor.prepare(regimes, table)
    position_bytes = rope_bytes(graph) + DeviceRows.position_bytes(max_sequences, block_tokens)
    vocab_size = int(str(graph.config["vocab_size"]))
    # Before what is free is asked for: it may be much where vocabularies are large.
    scratch = sampler_scratch(max_sequences, vocab_size, stream.device)
    limits = choose_limits(
        graph, free_bytes(), options, GPU_DEFAULTS, position_bytes,
        DeviceRows.most_positions(max_sequences, block_tokens),
    )  # fmt: skip
    rows = DeviceRows(library, limits, vocab_size, shares_of(graph), stream)
    graphs = CudaGraphExecutor(graph, executor, regimes, library, rows, limits, stream)
    sampler = DeviceSampler(library, rows, vocab_size, scratch, executor.copy_logits)
    runner = CudaModelRunner(graphs, rows, sampler, limits, vocab_size, stream)
    return CudaEngine(runner, graphs, rows, limits)
