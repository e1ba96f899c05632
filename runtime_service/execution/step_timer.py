"""Times steps of an engine on its device, as they are served: captured, from weights and caches that no cache holds.

Every layer has its own weights and KV cache, so a captured chain of one site's launches reads each once; what the
device's cache may hold of the replay before is overwritten between two of them. A step stands for its regime: the most
sequences that it takes, each with `context_tokens` in the cache; or a chunk of one prompt.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from kernels.attention.launch import shares_of
from kernels.batch import StepBatch
from kernels.kv_cache import by_layer, kv_format
from kernels.launch import Launch, Sizes
from kernels.launcher import KernelLibrary
from kernels.regimes import BLOCK_TOKENS, Regime
from kernels.tuning import Site, TuningTable
from runtime_service.execution.cuda_executor import CudaExecutor, DeviceBatch, PackedWeights
from runtime_service.execution.cuda_graphs import rope_of
from runtime_service.execution.device_stream import DeviceStream
from runtime_service.execution.tuner import Timing
from shared.errors import InvalidField
from shared.ir import Graph

_LEAST_CONTEXT_TOKENS = 128
# Bytes below it make small finite numbers in every format of a cache: e4m3, int8, bf16, fp16 and fp32.
_SMALL_BYTE = 0x3F

Clock = Callable[[Callable[[], None]], float]


@dataclass(frozen=True, slots=True)
class TimedSteps:
    """The steps that stand for the regimes.

    Args:
        sequences: of a step that takes any number.
        prompt_tokens: of a chunk, where a step takes any number.
        context_tokens: of a sequence that decodes, and at least of a prompt.
        readings: of each thing that is timed.
    """

    sequences: int = 256
    prompt_tokens: int = 2048
    context_tokens: int = 1024
    readings: int = 21


def fitting_steps(graph: Graph, free_bytes: int) -> TimedSteps:
    """The usual steps, or smaller ones where the model or half of the free memory takes no more.

    Raises:
        InvalidField: there is no memory to speak of.
    """
    usual = TimedSteps()
    positions = int(str(graph.config["max_position_embeddings"]))
    tokens = free_bytes // 2 // kv_format(graph).bytes_per_token(graph)
    sequences = usual.sequences
    while sequences > 1 and tokens // sequences < min(_LEAST_CONTEXT_TOKENS, positions):
        sequences //= 2
    context = min(usual.context_tokens, positions, tokens // sequences)
    context -= context % BLOCK_TOKENS
    if not context:
        raise InvalidField(field="memory", problem=f"{free_bytes:,} free bytes hold no KV cache")
    return TimedSteps(sequences, min(usual.prompt_tokens, positions, tokens), context)


class StepTimer:
    """A `Measurer`.

    Args:
        weights: packed tensors on the device, as `CudaExecutor` takes them.
        clock: runs what it is given on the device, from a cold cache; microseconds.
    """

    def __init__(
        self,
        graph: Graph,
        library: KernelLibrary,
        weights: PackedWeights,
        stream: DeviceStream,
        clock: Clock,
        steps: TimedSteps,
    ) -> None:
        self._steps, self._stream, self._clock = steps, stream, clock
        self._shares = shares_of(graph)
        most = max(steps.sequences, steps.prompt_tokens)
        sizes = Sizes(most, steps.sequences, steps.sequences)
        self._executor = CudaExecutor(graph, library, weights, sizes)
        positions = max(steps.context_tokens, steps.prompt_tokens)
        self._rope = rope_of(graph, positions, stream.device)
        blocks = max(
            steps.sequences * -(-steps.context_tokens // BLOCK_TOKENS),
            -(-positions // BLOCK_TOKENS),
        )
        self._blocks = torch.randperm(blocks, device=stream.device).int()
        parts = kv_format(graph).allocate(graph, blocks, BLOCK_TOKENS, self._small_values)
        self._caches = by_layer(parts)

    def time(self, regime: Regime, table: TuningTable, site: Site | None) -> Timing:
        """What one step takes, or what `site` launches in it; see `Measurer`."""
        self._executor.prepare([regime], table)
        plan = self._executor.plan(regime)
        if site is not None:
            plan = tuple(s for s in plan if isinstance(s, Launch) and s.site == site)
        batch = self._batch(regime)
        replay = self._stream.capture(lambda: self._executor.launch(plan, regime, batch))
        return Timing.of([self._clock(replay) for _ in range(self._steps.readings)])

    def _batch(self, regime: Regime) -> DeviceBatch:
        """Sequences whose last tokens are computed now, each in blocks of its own in no order."""
        steps = self._steps
        if regime.max_sequences:
            count, queries = min(regime.max_sequences, steps.sequences), 1
            length = steps.context_tokens
        else:
            count, queries = 1, min(regime.max_tokens or steps.prompt_tokens, steps.prompt_tokens)
            length = max(queries, steps.context_tokens)
        ints = {"dtype": torch.int32, "device": self._stream.device}
        stride = -(-length // BLOCK_TOKENS)
        # Rows begin at multiples of 16 integers, as kernels are promised.
        tables = torch.zeros(count, -(-stride // 16) * 16, **ints)  # type: ignore[call-overload]
        tables[:, :stride] = self._blocks[: count * stride].view(count, stride)
        positions = torch.arange(length - queries, length, **ints)  # type: ignore[call-overload]
        slots = (
            tables[:, (positions // BLOCK_TOKENS).long()] * BLOCK_TOKENS + positions % BLOCK_TOKENS
        )
        starts = torch.arange(0, count * queries + 1, queries, **ints)  # type: ignore[call-overload]
        return DeviceBatch(
            token_ids_T=torch.zeros(count * queries, **ints),  # type: ignore[call-overload]
            step=StepBatch(
                positions_T=positions.repeat(count),
                slot_mapping_T=slots.flatten().int(),
                block_tables_SB=tables,
                seq_lens_S=torch.full((count,), length, **ints),  # type: ignore[call-overload]
                query_start_S1=starts,
                logit_rows_R=(starts[1:] - 1).contiguous(),
                kv_caches=self._caches,
            ),
            part_start_S1=self._part_start(count, queries, length),
            rope=self._rope,
        )

    def _part_start(self, count: int, queries: int, length: int) -> torch.Tensor:
        parts = self._shares.further_parts(
            np.full(count, queries, np.int32), np.full(count, length, np.int32)
        )
        starts = np.concatenate(([0], parts.cumsum()), dtype=np.int32)
        return torch.from_numpy(starts).to(self._stream.device)

    def _small_values(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        made = torch.empty(shape, dtype=dtype, device=self._stream.device)
        made.view(torch.uint8).random_(0, _SMALL_BYTE)
        return made


class CudaClock:
    """Microseconds of the current device, by its events, each time from a cold cache."""

    def __init__(self) -> None:
        cache_bytes = torch.cuda.get_device_properties().L2_cache_size
        self._elsewhere = torch.empty(2 * cache_bytes, dtype=torch.uint8, device="cuda")
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

    def __call__(self, run: Callable[[], None]) -> float:
        """Runs it and waits."""
        self._elsewhere.zero_()
        self._start.record()
        run()
        self._end.record()
        self._end.synchronize()
        return 1e3 * float(self._start.elapsed_time(self._end))
