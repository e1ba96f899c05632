"""`Executor` on an NVIDIA GPU: decode steps replay captured graphs, other steps are launched one kernel at a time.

Padding exists only here: a decode step of T sequences replays the graph of the next larger bucket, whose unused
sequences have length 0, write nowhere and are read by nobody. A step's integers cross to the device in one copy.

Legend: T packed tokens, S sequences, B blocks per sequence, R rows whose logits are wanted, V vocabulary.
"""

import bisect
from dataclasses import dataclass, replace

import torch

from kernels.batch import StepBatch
from kernels.launch import Sizes
from kernels.launcher import KernelLibrary
from kernels.lowering import DECODE_REGIMES, REGIMES
from runtime_service.execution.cuda_executor import (
    CudaExecutor,
    DeviceBatch,
    PackedWeights,
    rope_table,
)
from runtime_service.limits import RuntimeLimits
from shared.ir import Graph

_ALIGNMENT = 64  # int32s: 256 bytes


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    logits_RV: torch.Tensor


class CudaGraphExecutor:
    """`Executor` over a `CudaExecutor`, with the KV cache and the captured graphs.

    Args:
        library: the engine's kernels, loaded for this device.
        weights: packed tensors on the device; kept.
    """

    def __init__(
        self, graph: Graph, library: KernelLibrary, weights: PackedWeights, limits: RuntimeLimits
    ) -> None:
        max_rows = max(limits.max_sequences, limits.max_step_tokens)
        self._max_sizes = Sizes(limits.max_step_tokens, limits.max_sequences, max_rows)
        self._regimes = [
            replace(r, block_tokens=limits.block_tokens, kv_dtype=limits.kv_dtype) for r in REGIMES
        ]
        self._executor = CudaExecutor(graph, library, weights, self._max_sizes)
        self._executor.prepare(self._regimes)
        self._vocab_size = int(str(graph.config["vocab_size"]))
        self._kv_caches = _kv_caches(graph, limits)
        self._rope = _rope_of(graph, limits.max_sequence_tokens)
        self._inputs = _Inputs(self._max_sizes, limits)
        largest = min(limits.max_sequences, DECODE_REGIMES[-1].max_sequences)
        self._buckets = [*(b for b in decode_buckets() if b < largest), largest]
        self._captured: dict[int, _Captured] = {}

    def capture(self) -> None:
        """Captures every bucket's graph, so that no step waits for it."""
        for bucket in reversed(self._buckets):
            self._capture(bucket)

    def forward(self, token_ids_T: torch.Tensor, batch: StepBatch) -> torch.Tensor:
        """Logits [R, V], fp32, on the host."""
        sizes = Sizes(len(token_ids_T), len(batch.seq_lens_S), len(batch.logit_rows_R))
        is_decode = sizes.tokens == sizes.sequences == sizes.rows
        if is_decode and sizes.tokens <= self._buckets[-1]:
            bucket = self._buckets[bisect.bisect_left(self._buckets, sizes.tokens)]
            if bucket not in self._captured:
                self._capture(bucket)
            self._inputs.fill(token_ids_T, batch, Sizes(bucket, bucket, bucket))
            captured = self._captured[bucket]
            captured.graph.replay()
            logits_RV = captured.logits_RV
        else:
            self._inputs.fill(token_ids_T, batch, sizes)
            ragged = self._regimes[len(DECODE_REGIMES) :]
            regime = next(r for r in ragged if not r.max_tokens or r.max_tokens >= sizes.tokens)
            logits_RV = self._executor.run(regime, self._device_batch(sizes))
        return logits_RV[: sizes.rows].cpu()

    def copy_blocks(self, copies: tuple[tuple[int, int], ...]) -> None:
        """Copies whole KV blocks in all layers, one after the other."""
        for caches in self._kv_caches:
            for cache in caches:
                for source, destination in copies:
                    cache[destination].copy_(cache[source])

    def _capture(self, bucket: int) -> None:
        regime = next(r for r in self._regimes if r.max_sequences >= bucket)
        batch = self._device_batch(Sizes(bucket, bucket, bucket))
        self._inputs.clear()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._executor.run(regime, batch)  # libraries choose and allocate outside the capture
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits_RV = self._executor.run(regime, batch)
        self._captured[bucket] = _Captured(graph, logits_RV)

    def _device_batch(self, sizes: Sizes) -> DeviceBatch:
        step = self._inputs.views(sizes)
        step.kv_caches = self._kv_caches
        return DeviceBatch(self._inputs.token_ids(sizes), step, self._rope)


def decode_buckets() -> list[int]:
    """Sizes of captured decode steps: padding stays near 10 % from 16 sequences on."""
    return [
        1,
        2,
        4,
        8,
        16,
        20,
        24,
        28,
        32,
        40,
        48,
        56,
        64,
        *range(80, 256, 16),
        *range(256, 513, 32),
    ]


class _Inputs:
    """A step's integers in one buffer on the device, at places that never move, and its image on the host."""

    def __init__(self, max_sizes: Sizes, limits: RuntimeLimits) -> None:
        max_blocks = -(-limits.max_sequence_tokens // limits.block_tokens)
        counts = {
            "token_ids": max_sizes.tokens,
            "positions": max_sizes.tokens,
            "slots": max_sizes.tokens,
            "seq_lens": max_sizes.sequences,
            "query_start": max_sizes.sequences + 1,
            "logit_rows": max_sizes.rows,
            "block_tables": max_sizes.sequences * max_blocks,
        }
        self._max_blocks = max_blocks
        self._places: dict[str, slice] = {}
        start = 0
        for name, count in counts.items():
            self._places[name] = slice(start, start + count)
            start += -(-count // _ALIGNMENT) * _ALIGNMENT
        self._host = torch.zeros(start, dtype=torch.int32, pin_memory=True)
        self._device = torch.zeros(start, dtype=torch.int32, device="cuda")

    def fill(self, token_ids_T: torch.Tensor, batch: StepBatch, padded: Sizes) -> None:
        """Writes a step and copies it over. The step before must have been read: its logits were."""
        host = {name: self._host[place] for name, place in self._places.items()}
        tokens, sequences = len(token_ids_T), len(batch.seq_lens_S)
        for name, values in (
            ("token_ids", token_ids_T),
            ("positions", batch.positions_T),
            ("slots", batch.slot_mapping_T),
            ("seq_lens", batch.seq_lens_S),
            ("query_start", batch.query_start_S1),
            ("logit_rows", batch.logit_rows_R),
        ):
            host[name][: len(values)] = values
        host["token_ids"][tokens : padded.tokens] = 0
        host["positions"][tokens : padded.tokens] = 0
        host["slots"][tokens : padded.tokens] = -1
        host["seq_lens"][sequences : padded.sequences] = 0
        host["logit_rows"][len(batch.logit_rows_R) : padded.rows] = 0
        tables = host["block_tables"].view(-1, self._max_blocks)
        tables[:sequences, : batch.block_tables_SB.shape[1]] = batch.block_tables_SB
        self._device.copy_(self._host, non_blocking=True)

    def clear(self) -> None:
        """A step of nothing but padding."""
        self._host.zero_()
        self._host[self._places["slots"]] = -1
        self._device.copy_(self._host, non_blocking=True)

    def token_ids(self, sizes: Sizes) -> torch.Tensor:
        """The device's token ids [T]."""
        return self._device[self._places["token_ids"]][: sizes.tokens]

    def views(self, sizes: Sizes) -> StepBatch:
        """The device's batch of these sizes, without KV caches."""
        at = {name: self._device[place] for name, place in self._places.items()}
        return StepBatch(
            positions_T=at["positions"][: sizes.tokens],
            slot_mapping_T=at["slots"][: sizes.tokens],
            block_tables_SB=at["block_tables"].view(-1, self._max_blocks)[: sizes.sequences],
            seq_lens_S=at["seq_lens"][: sizes.sequences],
            query_start_S1=at["query_start"][: sizes.sequences + 1],
            logit_rows_R=at["logit_rows"][: sizes.rows],
            kv_caches=(),
        )


def _kv_caches(graph: Graph, limits: RuntimeLimits) -> list[tuple[torch.Tensor, torch.Tensor]]:
    num_layers, heads, head_dim = (
        int(str(graph.config[name])) for name in ("num_layers", "num_kv_heads", "head_dim")
    )
    shape = (limits.num_blocks, limits.block_tokens, heads, head_dim)
    dtype = getattr(torch, limits.kv_dtype)

    def empty() -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device="cuda")

    return [(empty(), empty()) for _ in range(num_layers)]


def _rope_of(graph: Graph, num_positions: int) -> torch.Tensor:
    nodes = [node for node in graph.nodes if node.op == "qkv_rope_write"]
    forms = {(node.attrs["inv_freq"], node.attrs["attention_scaling"]) for node in nodes}
    assert len(forms) == 1, f"layers rotate in {len(forms)} ways"
    inv_freq, scaling = forms.pop()
    assert isinstance(inv_freq, tuple)
    assert isinstance(scaling, int | float)
    return rope_table([float(f) for f in inv_freq], float(scaling), num_positions)
