"""Runs a graph on the CPU: every node bound to its weights once, then called in order.

Legend: T packed tokens, R rows whose logits are wanted, V vocabulary.
"""

import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from kernels.batch import StepBatch
from kernels.cpu import bind_node
from kernels.cpu_form import BoundOp, CpuTarget, PackedWeight
from kernels.early_rows import select_rows_early
from kernels.kv_cache import by_layer, kv_format
from kernels.linear.cpu import padded_rows
from kernels.ops import OPS
from runtime_service.execution.recorded_steps import RecordedSteps
from shared.ir import Graph, Node

# One that takes longer than this many operations does (some 50 ms) hides what compiling it takes.
MOST_PREPARED_FLOPS = 10_000_000_000

# (form, inputs' places, outputs' places)
_Step = tuple[BoundOp, tuple[int, ...], tuple[int, ...]]


class CpuExecutor:
    """`Executor` on this machine's CPU.

    Args:
        read_weight: packed tensors of a weight by role; asked once for each reading node.
        num_blocks: KV blocks; their memory is touched only when they are written.
    """

    def __init__(
        self,
        graph: Graph,
        read_weight: Callable[[str], Mapping[str, torch.Tensor]],
        target: CpuTarget,
        num_blocks: int,
        block_tokens: int,
    ) -> None:
        graph = select_rows_early(graph)
        names = ["token_ids", *(name for node in graph.nodes for name in node.outputs)]
        self._places = {name: place for place, name in enumerate(names)}
        # Packing is most of a start: nodes are bound in threads.
        with ThreadPoolExecutor(torch.get_num_threads(), "pack-weights") as pool:
            self._steps = list(
                pool.map(lambda node: self._bind(graph, node, read_weight, target), graph.nodes)
            )
        # Linears of one shape and layout share what oneDNN compiles.
        self._linears: dict[tuple[object, ...], tuple[BoundOp, int, int]] = {}
        for node, (form, _, _) in zip(graph.nodes, self._steps, strict=True):
            if node.op == "linear":
                weight = graph.weights[node.weights["weight"]]
                kind = (weight.shape, weight.layout, "bias" in node.weights)
                num_out, num_in = weight.shape
                self._linears.setdefault(kind, (form, num_out, num_in))
        self._dtype = target.activation_dtype
        (output,) = graph.outputs
        self._output = self._places[output]
        last_reader = {place: i for i, (_, inputs, _) in enumerate(self._steps) for place in inputs}
        # Values that no later node reads, a list for each node: their memory is used again.
        self._ended: list[list[int]] = [[] for _ in self._steps]
        for place, index in last_reader.items():
            self._ended[index].append(place)
        self._vocab_size = int(str(graph.config["vocab_size"]))
        # Where no logits are wanted, what has a row for each of them is not run.
        specs = graph.infer(OPS)
        self._for_all_rows = [
            index
            for index, node in enumerate(graph.nodes)
            if specs[node.outputs[0]].dims[:1] != ("R",)
        ]
        kept = kv_format(graph, str(target.kv_dtype).removeprefix("torch."))
        self._kv_caches = by_layer(kept.allocate(graph, num_blocks, block_tokens, _zeros))
        self._recorded = RecordedSteps(self._run, self._kv_caches, num_blocks)

    def forward(self, token_ids_T: torch.Tensor, batch: StepBatch) -> torch.Tensor:
        """Logits [R, V], fp32."""
        batch.kv_caches = self._kv_caches
        if not batch.logit_rows_R.numel():
            self._run(token_ids_T, batch)
            return torch.empty(0, self._vocab_size)
        logits = self._recorded.forward(token_ids_T, batch)
        if logits is None:
            logits = self._run(token_ids_T, batch)
        return logits.float()

    def preparations(self, max_rows: int) -> Iterator[Callable[[], object]]:
        """Pieces of work that spare later steps the compiling of their products, those of few rows first.

        What is compiled is kept, about half a megabyte each: without this a process grows until it has seen steps
        of every size.

        Args:
            max_rows: of a step.
        """
        for num_rows in sorted({padded_rows(rows) for rows in range(1, max_rows + 1)}):
            for form, num_out, num_in in self._linears.values():
                if 2 * num_rows * num_out * num_in <= MOST_PREPARED_FLOPS:
                    yield partial(form, torch.zeros(num_rows, num_in, dtype=self._dtype), None)

    def _run(self, token_ids_T: torch.Tensor, batch: StepBatch) -> Any:
        """Calls the forms in order; gives the output, or None where no logits are wanted."""
        values: list[Any] = [None] * len(self._places)
        values[0] = token_ids_T
        has_rows = batch.logit_rows_R.numel() > 0
        for index in range(len(self._steps)) if has_rows else self._for_all_rows:
            form, inputs, outputs = self._steps[index]
            if len(inputs) == 1:
                result = form(values[inputs[0]], batch)
            else:
                result = form(values[inputs[0]], values[inputs[1]], batch)
            if len(outputs) == 1:
                values[outputs[0]] = result
            else:
                for place, value in zip(outputs, result, strict=True):
                    values[place] = value
            for place in self._ended[index]:
                values[place] = None
        return values[self._output]

    def copy_blocks(self, copies: tuple[tuple[int, int], ...]) -> None:
        """Copies whole KV blocks in all layers, one after the other."""
        for caches in self._kv_caches:
            for cache in caches:
                for source, destination in copies:
                    cache[destination] = cache[source]

    def _bind(
        self,
        graph: Graph,
        node: Node,
        read_weight: Callable[[str], Mapping[str, torch.Tensor]],
        target: CpuTarget,
    ) -> _Step:
        weights = {
            role: PackedWeight(graph.weights[name], read_weight(name))
            for role, name in node.weights.items()
        }
        inputs = tuple(self._places[name] for name in node.inputs)
        assert len(inputs) in (1, 2), f"{node.op} has {len(inputs)} inputs"
        outputs = tuple(self._places[name] for name in node.outputs)
        return bind_node(node, weights, target), inputs, outputs


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros whose pages the kernel gives when they are first written."""
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8).view(dtype).view(shape)
