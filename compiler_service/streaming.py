"""Runs a graph over whole texts, a node at a time, with no more than one node's weights in memory.

Everything is computed in fp32, by the ops' CPU forms: bf16 would add about as much error as int8
weights do. What is kept between nodes is activations of the texts, each until its last reader. A model
that is larger than the memory can so be calibrated and measured. Weights come as rows, so that a
large one is never widened as a whole.

Legend: T packed tokens, N out, K in.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from kernels.batch import StepBatch
from kernels.cpu import bind_node
from kernels.cpu_form import PackedWeight, cpu_target
from kernels.linear.layouts import LAYOUTS
from kernels.reference import prompt_batch
from shared.errors import InvalidModel
from shared.ir import Graph, Node

# Rows of a weight are widened in pieces of about this many values.
_CHUNK_VALUES = 1 << 22
# Its square is a number of fp32.
_LARGEST_NORM = 1e18

RowsOf = Callable[[slice | torch.Tensor], torch.Tensor]
"""Rows of a weight, by a slice or by their numbers: fp32, of the weight's other dims."""


def dense_rows(parts: Sequence[torch.Tensor]) -> RowsOf:
    """Rows of checkpoint tensors that are joined along dim 0; they stay as they are."""
    if len(parts) == 1:
        return lambda rows: parts[0][rows].float()

    def read(rows: slice | torch.Tensor) -> torch.Tensor:
        if isinstance(rows, torch.Tensor):
            return torch.cat(list(parts))[rows].float()
        found, first = [], 0
        for part in parts:
            start, end, _ = rows.indices(sum(map(len, parts)))
            found.append(part[max(start - first, 0) : max(end - first, 0)].float())
            first += len(part)
        return torch.cat(found)

    return read


def packed_rows(layout: str, packed: Mapping[str, torch.Tensor]) -> RowsOf:
    """Rows of a packed weight, as its layout's values."""
    unpack = LAYOUTS[layout].unpack
    return lambda rows: unpack({role: tensor[rows] for role, tensor in packed.items()})


def row_chunks(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Slices that cover a weight's rows in pieces of bounded size."""
    step = max(_CHUNK_VALUES // num_columns, 1)
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))


def product(x_TK: torch.Tensor, rows_of: RowsOf, num_rows: int) -> torch.Tensor:
    """x @ weight.T [T, N], the weight read in pieces."""
    y_TN = torch.empty(len(x_TK), num_rows)
    for rows in row_chunks(num_rows, x_TK.shape[1]):
        y_TN[:, rows] = x_TK @ rows_of(rows).T
    return y_TN


def values_a_token(graph: Graph) -> int:
    """How many fp32 values a run holds for each token, at most: the widest linear's input and output,
    and the residual stream beside them."""
    widths = [
        sum(graph.weights[node.weights["weight"]].shape)
        for node in graph.nodes
        if node.op == "linear" and node.outputs[0] not in graph.outputs
    ]
    return max(widths, default=0) + int(str(graph.config["hidden_size"]))


class Stream:
    """One run of a graph; nodes are run in order by who brings their weights.

    Args:
        texts: token ids, each a sequence of its own.
        logit_rows: packed tokens whose logits are wanted.
        going_on: by text, an earlier one and how many of its first tokens come before it.
        keeps_kv: the KV cache is fp32, whatever the graph was built for.
    """

    def __init__(
        self,
        graph: Graph,
        texts: Sequence[torch.Tensor],
        logit_rows: Sequence[int] = (),
        going_on: Mapping[int, tuple[int, int]] | None = None,
        *,
        keeps_kv: bool = True,
    ) -> None:
        if keeps_kv:
            config = {name: value for name, value in graph.config.items() if name != "kv_cache"}
            graph = replace(graph, config=config)
        # Blocks of one token: texts may part anywhere.
        batch = prompt_batch(
            graph, list(map(len, texts)), block_tokens=1, logit_rows=logit_rows, going_on=going_on
        )
        # A layer reads only what it has just written, so one cache serves all layers.
        batch.kv_caches = [batch.kv_caches[0]] * len(batch.kv_caches)
        self._batch: StepBatch = batch
        self._graph = graph
        self._target = replace(
            cpu_target(graph),
            activation_dtype=torch.float32,
            kv_dtype=batch.kv_caches[0][0].dtype,
        )
        self._values = {"token_ids": torch.cat(list(texts)).int()}
        self._from_linears = {n.outputs[0] for n in graph.nodes if n.op == "linear"}
        self._readers = Counter(name for node in graph.nodes for name in node.inputs)

    def input(self, node: Node) -> torch.Tensor:
        """The first input of `node`, which must be the next to run; fp32 or token ids."""
        return self._values[node.inputs[0]]

    def squarable_input(self, node: Node) -> torch.Tensor:
        """The first input of a linear, for schemes that sum up its squares.

        Raises:
            InvalidModel: they are beyond fp32; names the weight.
        """
        x_TK = self.input(node)
        if not float(torch.linalg.vector_norm(x_TK)) < _LARGEST_NORM:
            name = node.weights["weight"]
            problem = f"on the calibration text {name} reads NaN, infinity or numbers beyond 1e18"
            raise InvalidModel(problem=problem)
        return x_TK

    def written_share(self, node: Node) -> float:
        """Of the residual stream that `node`, the next to run, adds up and normalizes: the norm of
        what is added, as a share of the sum's."""
        added, residual = (self._values[name] for name in node.inputs)
        if node.inputs[1] in self._from_linears:
            added, residual = residual, added
        norm = float(torch.linalg.vector_norm(added + residual))
        return float(torch.linalg.vector_norm(added)) / norm if norm else 0.0

    def run(self, node: Node, weights: Mapping[str, RowsOf]) -> None:
        """Computes `node` from weights by role; a linear multiplies its input as it is."""
        if node.op == "embedding":
            outputs: Sequence[Any] = (weights["weight"](self.input(node).long()),)
        elif node.op == "linear":
            x_TK, num_rows = self.input(node), self._graph.weights[node.weights["weight"]].shape[0]
            y_TN = product(x_TK, weights["weight"], num_rows)
            outputs = (y_TN + weights["bias"](slice(None)) if "bias" in weights else y_TN,)
        else:
            form = bind_node(node, self._bound_weights(node, weights), self._target)
            found = form(*(self._values[name] for name in node.inputs), self._batch)
            outputs = found if len(node.outputs) > 1 else (found,)
        self.finish(node, outputs)

    def _bound_weights(self, node: Node, weights: Mapping[str, RowsOf]) -> dict[str, PackedWeight]:
        specs = {role: self._graph.weights[name] for role, name in node.weights.items()}
        return {
            role: PackedWeight(
                replace(specs[role], layout="plain", dtype="float32"),
                {"weight": rows_of(slice(None))},
            )
            for role, rows_of in weights.items()
        }

    def finish(self, node: Node, outputs: Sequence[Any]) -> None:
        """Takes the outputs of a node that was computed elsewhere."""
        for name in node.inputs:
            self._readers[name] -= 1
            if not self._readers[name]:
                del self._values[name]
        for name, value in zip(node.outputs, outputs, strict=True):
            if self._readers[name]:
                self._values[name] = value
