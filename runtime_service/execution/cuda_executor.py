"""Runs a fused graph on an NVIDIA GPU from an engine's machine code.

Binds the launches of `kernels/lowering.py` to device memory: weights as loaded, activations in an arena shared by
liveness, the step's batch by reference. Knows nothing of requests, of CUDA graphs, or of how a token is drawn.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from kernels.batch import StepBatch
from kernels.launch import (
    Batch,
    KvCache,
    Launch,
    MatMul,
    Number,
    Operand,
    Scratch,
    Sizes,
    Step,
    Temporary,
    Value,
    Weight,
)  # fmt: skip
from kernels.launcher import KernelLibrary
from kernels.lowering import lower, step_graph
from kernels.ops import OPS
from kernels.regimes import Regime
from kernels.tuning import BUILT_IN, TuningTable
from shared.ir import Graph, TensorSpec

PackedWeights = Mapping[str, Mapping[str, torch.Tensor]]

_ALIGNMENT_BYTES = 256
_ROPE_PIECE = 1 << 14


@dataclass(frozen=True, slots=True)
class DeviceBatch:
    """A step's batch on the device, with what else its ops read.

    Args:
        token_ids_T: int32, beside `step`'s tensors.
        part_start_S1: int32; further parts of attention of the sequences before each, then of all (`Shares`).
        rope: fp32 [positions, head_dim]: cos of each angle, then sin.
    """

    token_ids_T: torch.Tensor
    step: StepBatch
    part_start_S1: torch.Tensor
    rope: torch.Tensor

    @property
    def sizes(self) -> Sizes:
        """T, S and R of the tensors as they are."""
        return Sizes(
            self.token_ids_T.shape[0],
            self.step.seq_lens_S.shape[0],
            self.step.logit_rows_R.shape[0],
        )


class CudaExecutor:
    """A graph bound to its weights on the current device.

    Args:
        library: the engine's kernels; must hold the variants of every regime that is run.
        weights: packed tensors on the device, by weight name and role; kept, not copied.
        max_sizes: the largest step; activations are allocated for it once.
    """

    def __init__(
        self, graph: Graph, library: KernelLibrary, weights: PackedWeights, max_sizes: Sizes
    ) -> None:
        self._graph = graph
        self._library = library
        self._weights = weights
        self._max_sizes = max_sizes
        self._plans: dict[Regime, tuple[Step, ...]] = {}
        self._buffers: dict[Regime, dict[str, torch.Tensor]] = {}
        self._scratch: dict[str, torch.Tensor] = {}
        self._dtype: torch.dtype = getattr(torch, str(graph.config["dtype"]))
        self._device = next(t for roles in weights.values() for t in roles.values()).device
        self._arena = torch.empty(0, dtype=torch.uint8, device=self._device)

    @property
    def max_sizes(self) -> Sizes:
        """The largest step."""
        return self._max_sizes

    def prepare(self, regimes: Sequence[Regime], table: TuningTable = BUILT_IN) -> None:
        """Loads the regimes' kernels and allocates their memory: afterwards nothing is allocated, so that
        steps can be captured.

        Args:
            table: what takes the place of built-in choices.
        """
        layouts = {}
        need = 0
        for regime in regimes:
            plan = lower(self._graph, self._library.arch, regime, table)
            specs = step_graph(self._graph, regime).infer(OPS)
            for step in plan:
                if isinstance(step, Launch):
                    self._library.kernel(step.variant)
                    self._grow_scratch(step, regime)
            self._plans[regime] = plan
            layouts[regime] = self._lay_out(plan, specs, regime)
        (output,) = self._graph.outputs
        for places, end in layouts.values():
            start, size, _, _ = places[output]
            need = max(need, end, _place_of_copy(start, size) + size)
        if need > self._arena.numel():
            self._arena = torch.empty(need, dtype=torch.uint8, device=self._device)
        for regime, (places, _) in layouts.items():
            self._buffers[regime] = {
                name: self._arena[start : start + size].view(dtype).view(-1, width)
                for name, (start, size, dtype, width) in places.items()
            }

    def run(self, regime: Regime, batch: DeviceBatch) -> torch.Tensor:
        """Launches one step and does not wait.

        Returns:
            Logits [R, V], fp32, in memory that the next step overwrites.
        """
        self.launch(self._plans[regime], regime, batch)
        return self._buffers[regime][self._graph.outputs[0]][: batch.sizes.rows]

    def copy_logits(self, logits_RV: torch.Tensor) -> torch.Tensor:
        """A copy of what `run` returned, in memory that the next step overwrites: where activations were."""
        size = logits_RV.numel() * logits_RV.itemsize
        start = logits_RV.data_ptr() - self._arena.data_ptr()
        at = _place_of_copy(start, size)
        copy = self._arena[at : at + size].view(logits_RV.dtype).view(logits_RV.shape)
        return copy.copy_(logits_RV)

    def plan(self, regime: Regime) -> tuple[Step, ...]:
        """What a step of a prepared regime launches, in order."""
        return self._plans[regime]

    def launch(self, steps: Sequence[Step], regime: Regime, batch: DeviceBatch) -> None:
        """Launches some of a regime's steps; all of them are a whole step."""
        sizes, buffers = batch.sizes, self._buffers[regime]
        for step in steps:
            if isinstance(step, MatMul):
                self._matmul(step, buffers, sizes)
                continue
            grid = step.grid(sizes)
            if grid[0] * grid[1]:
                arguments = [self._address(o, buffers, batch, sizes) for o in step.operands]
                self._library.kernel(step.variant)(grid, *arguments)

    def load_products(self, regime: Regime, tokens: Sequence[int], rows: Sequence[int]) -> None:
        """Multiplies once with each of these numbers of tokens, and of rows whose logits are wanted.

        The library loads a kernel when it first wants it, and that waits for all that the device is at: in a server
        that is at work each would cost a step's time.
        """
        kinds = {}
        for step in self._plans[regime]:
            if isinstance(step, MatMul):
                weight = self._graph.weights[step.weight]
                forms = step.bias is None, step.adds is None, step.x_scale is None
                is_logits = step.out.name in self._graph.outputs
                kinds[weight.shape, weight.layout, step.size, is_logits, *forms] = step
        for step in kinds.values():
            for count in tokens if step.size == "tokens" else rows:
                self._matmul(step, self._buffers[regime], Sizes(count, count, count))

    def _address(
        self, operand: Operand, buffers: dict[str, torch.Tensor], batch: DeviceBatch, sizes: Sizes
    ) -> int | float:
        if isinstance(operand, Value | Temporary):
            return buffers[operand.name].data_ptr()
        if isinstance(operand, Weight):
            return self._weights[operand.name][operand.role].data_ptr()
        if isinstance(operand, Batch):
            holder = batch if hasattr(batch, operand.field) else batch.step
            return int(getattr(holder, operand.field).data_ptr())
        if isinstance(operand, KvCache):
            return batch.step.kv_caches[operand.layer][operand.part].data_ptr()
        if isinstance(operand, Scratch):
            return self._scratch[operand.name].data_ptr()
        if isinstance(operand, Number):
            return operand.value
        if operand.field == "table_stride":
            return batch.step.block_tables_SB.stride(0)
        return int(getattr(sizes, operand.field))

    def _matmul(self, step: MatMul, buffers: dict[str, torch.Tensor], sizes: Sizes) -> None:
        is_logits = step.out.name in self._graph.outputs
        num_rows = int(getattr(sizes, step.size))
        if num_rows < step.least_rows:
            return
        x, out = buffers[step.x.name][:num_rows], buffers[step.out.name][:num_rows]
        packed = self._weights[step.weight]
        weight = packed["weight"].t() if step.dense is None else self._dense(step).t()
        if step.x_scale is not None:
            result = torch._scaled_mm(
                x, weight, scale_a=buffers[step.x_scale.name][:num_rows],
                scale_b=packed["scale"].view(1, -1), out_dtype=self._dtype,
                use_fast_accum=True, out=None if is_logits else out,
            )  # fmt: skip
            if is_logits:
                out.copy_(result)
        elif is_logits:
            torch.mm(x, weight, out_dtype=out.dtype, out=out)
        elif step.adds is not None:
            torch.addmm(out, x, weight, out=out)
        else:
            torch.mm(x, weight, out=out)
        if step.bias is not None:
            out += self._weights[step.bias]["weight"]

    def _dense(self, step: MatMul) -> torch.Tensor:
        """The weight's values in scratch memory, [N, K]."""
        assert step.dense is not None, "the weight is as stored"
        rows, columns = self._graph.weights[step.weight].shape
        values = self._scratch[step.dense.name].view(self._dtype)
        return values[: rows * columns].view(rows, columns)

    # Memory.

    def _lay_out(
        self, plan: tuple[Step, ...], specs: Mapping[str, TensorSpec], regime: Regime
    ) -> tuple[dict[str, tuple[int, int, torch.dtype, int]], int]:
        """Places of values in the arena: a value's bytes are free again after its last reader."""
        last = {value.name: i for i, step in enumerate(plan) for value in _values(step)}
        last |= dict.fromkeys(self._graph.outputs, len(plan))
        # A sum takes the place of what it was added to.
        held = {
            step.out.name: step.adds.name
            for step in plan
            if isinstance(step, MatMul) and step.adds is not None
        }
        for name in reversed(held):
            last[held[name]] = last[name]
        places: dict[str, tuple[int, int, torch.dtype, int]] = {}
        live: list[tuple[int, int, int]] = []  # (start, end, last use)
        end = 0
        for index, step in enumerate(plan):
            for value in _values(step):
                name = value.name
                if name in places:
                    continue
                if name in held:
                    places[name] = places[held[name]]
                    continue
                dtype, width, rows = self._spec(value, specs, regime)
                size = rows * width * dtype.itemsize
                room = -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
                live = sorted(entry for entry in live if entry[2] >= index)
                start = _first_gap(live, room)
                live.append((start, start + room, last[name]))
                places[name] = (start, size, dtype, width)
                end = max(end, start + room)
        return places, end

    def _spec(
        self, value: Value | Temporary, specs: Mapping[str, TensorSpec], regime: Regime
    ) -> tuple[torch.dtype, int, int]:
        """dtype, elements in a row, and rows of a value."""
        tokens = regime.max_tokens or self._max_sizes.tokens
        if isinstance(value, Temporary):
            return getattr(torch, value.dtype), value.width, tokens
        rows, width = specs[value.name].dims
        dtype = torch.float32 if value.name in self._graph.outputs else self._dtype
        return dtype, int(width), min(self._max_sizes.rows, tokens) if rows == "R" else tokens

    def _grow_scratch(self, launch: Launch, regime: Regime) -> None:
        tokens = regime.max_tokens or self._max_sizes.tokens
        sizes = Sizes(tokens, regime.max_sequences or self._max_sizes.sequences, tokens)
        for operand in launch.operands:
            if isinstance(operand, Scratch):
                size = operand.num_bytes(sizes)
                if operand.name not in self._scratch or self._scratch[operand.name].numel() < size:
                    self._scratch[operand.name] = torch.zeros(
                        size, dtype=torch.uint8, device=self._device
                    )


def rope_table(
    inv_freq: Sequence[float],
    attention_scaling: float,
    num_positions: int,
    device: torch.device | str = "cuda",
) -> torch.Tensor:
    """cos then sin of each position's angles, fp32 [num_positions, 2 * len(inv_freq)]; fp64 inside."""
    frequencies = torch.tensor(inv_freq, dtype=torch.float64, device=device)
    table = torch.empty(num_positions, 2 * len(inv_freq), dtype=torch.float32, device=device)
    # Piece by piece: of a million positions fp64 would take gigabytes, when the KV cache has taken its share.
    for piece in torch.split(table, _ROPE_PIECE):
        first = piece.storage_offset() // table.shape[1]
        positions = torch.arange(first, first + len(piece), dtype=torch.float64, device=device)
        angles = torch.outer(positions, frequencies)
        piece.copy_(torch.cat((angles.cos(), angles.sin()), 1) * attention_scaling)
    return table


def _values(step: Step) -> Iterator[Value | Temporary]:
    operands = (
        step.operands if isinstance(step, Launch) else (step.x, step.x_scale, step.adds, step.out)
    )
    for operand in operands:
        if isinstance(operand, Value | Temporary):
            yield operand


def _place_of_copy(start: int, size: int) -> int:
    """Where in the arena a copy of [start, start + size) begins."""
    return 0 if start >= size else -(-(start + size) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _first_gap(live: list[tuple[int, int, int]], room: int) -> int:
    start = 0
    for low, high, _ in live:
        if low - start >= room:
            break
        start = max(start, high)
    return start
