"""One pass over a graph, node by node: each weight is read, packed and handed on, and what it does
to the model is measured as the pass goes.

Up to two runs go along: the unquantized graph over the probe's texts, and the quantized one over
the same texts and over those that the scheme calibrates with. Every weight is read once (a tied
head once more), and no more than one node's weights are in memory.

Legend: T packed tokens, N out, K in, R rows whose logits are wanted.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from compiler_service.checkpoints.checkpoint import Checkpoint
from compiler_service.quality.logits import LogitComparison
from compiler_service.quality.probe import Probe
from compiler_service.quality.report import Measurement, WeightError, measurement_of
from compiler_service.quantization.scheme import Adjustment, Pack, QuantScheme
from compiler_service.streaming import (
    RowsOf,
    Stream,
    dense_rows,
    packed_rows,
    row_chunks,
)
from compiler_service.weight_table import import_weight, pack_weight, read_parts
from kernels.linear.op import FP8_MAX, activations, multiplied
from shared.ir import Graph, Node

# Errors of weights are measured on about this many tokens.
_SAMPLED_TOKENS = 64

Packed = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Weight:
    """A weight while its node runs: as the checkpoint has it, and as it is stored."""

    dense: RowsOf
    stored: RowsOf
    adjustment: Adjustment


class GraphQuantizer:
    """Passes over one graph, whose layouts are chosen.

    Args:
        adjustments: by weight name, from the scheme's calibration.
        probe: what to measure with; None measures nothing.
        calibration: texts whose inputs the scheme wants to see when it packs; empty otherwise.
        imported: weights whose packed values are the checkpoint's own.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        graph: Graph,
        scheme: QuantScheme,
        adjustments: Mapping[str, Adjustment],
        probe: Probe | None,
        calibration: Sequence[torch.Tensor] = (),
        imported: frozenset[str] = frozenset(),
    ) -> None:
        self._checkpoint, self._graph, self._scheme = checkpoint, graph, scheme
        self._adjustments, self._probe = adjustments, probe
        self._imported = imported
        texts, rows = (probe.texts, probe.logit_rows) if probe else ((), ())
        going_on = probe.going_on if probe else {}
        self._num_probed = sum(map(len, texts))
        self._reference = Stream(graph, texts, rows, going_on) if probe else None
        seen = (*texts, *(calibration if scheme.reads_inputs else ()))
        self._quantized = Stream(graph, seen, rows, going_on, keeps_kv=False) if seen else None
        self._uses = Counter(name for node in graph.nodes for name in node.weights.values())
        self._used_again: dict[str, Packed] = {}
        self._errors: list[WeightError] = []
        self._block: list[WeightError] = []
        self._measurement: Measurement | None = None

    def run(
        self,
        write: Callable[[str, Packed], None] | None,
        on_weight: Callable[[str], None],
    ) -> Measurement | None:
        """What was measured; None without a probe. May be called once.

        Args:
            write: takes each weight's packed tensors, in the order of first use.
            on_weight: told each weight's name once it was used.

        Raises:
            InvalidModel: a tensor holds NaN or infinity; names it.
        """
        told: set[str] = set()
        for node in self._graph.nodes:
            if self._quantized is not None:
                self._run_node(node, self._quantized, write)
            for name in node.weights.values():
                if name in told:
                    continue
                if self._quantized is None:
                    parts = () if name in self._imported else self._read(name)
                    self._pack(node, name, parts, write)
                told.add(name)
                on_weight(name)
        return self._measurement

    def _run_node(
        self, node: Node, quantized: Stream, write: Callable[[str, Packed], None] | None
    ) -> None:
        weights = {role: self._load(node, name, write) for role, name in node.weights.items()}
        if node.op == "linear" and node.outputs[0] in self._graph.outputs:
            self._compare_logits(node, weights["weight"], quantized)
        elif node.op == "linear":
            self._run_linear(node, weights, quantized)
        else:
            if self._reference is not None:
                if node.op == "rms_norm" and node.attrs["residual"]:
                    self._end_block(self._reference.written_share(node))
                if node.op == "embedding":
                    self._compare_embedding(node, weights["weight"], self._reference)
                self._reference.run(node, {role: w.dense for role, w in weights.items()})
            quantized.run(node, {role: w.stored for role, w in weights.items()})

    def _end_block(self, share: float) -> None:
        """Ranks the weights since the last block, which have added `share` of what is read next."""
        ranked = (replace(weight, impact=weight.error * share) for weight in self._block)
        self._errors.extend(ranked)
        self._block.clear()

    def _load(self, node: Node, name: str, write: Callable[[str, Packed], None] | None) -> _Weight:
        parts = self._read(name)
        packed = self._used_again.pop(name, None)
        if packed is None:
            packed = self._pack(node, name, parts, write)
        self._uses[name] -= 1
        if self._uses[name]:
            self._used_again[name] = packed
        layout = self._graph.weights[name].layout
        adjustment = self._adjustments.get(name, Adjustment())
        return _Weight(dense_rows(parts), packed_rows(layout, packed), adjustment)

    def _read(self, name: str) -> list[torch.Tensor]:
        return read_parts(self._checkpoint, self._graph.weights[name])

    def _pack(
        self,
        node: Node,
        name: str,
        parts: Sequence[torch.Tensor],
        write: Callable[[str, Packed], None] | None,
    ) -> Packed:
        weight, adjustment = self._graph.weights[name], self._adjustments.get(name)
        if name in self._imported:
            packed = import_weight(self._checkpoint, weight)
        else:
            packed = pack_weight(weight, parts, adjustment, self._packer(node, name))
        if write is not None:
            write(name, packed)
        return packed

    def _packer(self, node: Node, name: str) -> Pack | None:
        """How the scheme packs this weight; None where its layout does by itself."""
        weight, prepare = self._graph.weights[name], self._scheme.prepare_pack
        is_inside = node.op == "linear" and node.outputs[0] not in self._graph.outputs
        if prepare is None or not is_inside or weight.layout != self._scheme.linear_layout:
            return None
        inputs_TK = None
        if self._scheme.reads_inputs:
            assert self._quantized is not None, "a scheme reads inputs and nothing runs"
            inputs_TK = self._quantized.squarable_input(node)[self._num_probed :]
        return prepare(
            weight.group_size, inputs_TK, self._adjustments.get(name, Adjustment()).importance_K
        )

    def _run_linear(self, node: Node, weights: Mapping[str, _Weight], quantized: Stream) -> None:
        name = node.weights["weight"]
        weight, spec = weights["weight"], self._graph.weights[name]
        num_rows, num_columns = spec.shape
        x_TK = _multiplied(node, spec.layout, quantized.input(node))
        y_TN = torch.empty(len(x_TK), num_rows)
        if self._reference is None:
            for rows in row_chunks(num_rows, num_columns):
                y_TN[:, rows] = x_TK @ weight.stored(rows).T
        else:
            expected_TK = self._reference.input(node)
            expected_TN = torch.empty(len(expected_TK), num_rows)
            error = _OutputError(
                node, spec.layout, weight.adjustment, expected_TK, self._num_probed
            )
            for rows in row_chunks(num_rows, num_columns):
                stored = weight.stored(rows)
                expected_TN[:, rows] = expected_TK @ weight.dense(rows).T
                y_TN[:, rows] = x_TK @ stored.T
                error.add(rows, stored, expected_TN[:, rows], y_TN[:, rows])
            self._block.append(WeightError(name, spec.layout, error.own, error.drift, 0.0))
            if "bias" in weights:
                expected_TN += weights["bias"].dense(slice(None))
            self._reference.finish(node, (expected_TN,))
        if "bias" in weights:
            y_TN += weights["bias"].stored(slice(None))
        quantized.finish(node, (y_TN,))

    def _compare_embedding(self, node: Node, weight: _Weight, reference: Stream) -> None:
        name = node.weights["weight"]
        if self._uses[name]:  # the head as well, which says what the weight costs
            return
        ids_T = reference.input(node).long()
        ids_T = ids_T[:: max(len(ids_T) // _SAMPLED_TOKENS, 1)]
        expected_TK = weight.dense(ids_T)
        error = _ratio(_square(weight.stored(ids_T) - expected_TK), _square(expected_TK))
        self._block.append(WeightError(name, self._graph.weights[name].layout, error, error, 0.0))
        self._end_block(1.0)  # the residual stream begins with it

    def _compare_logits(self, node: Node, weight: _Weight, quantized: Stream) -> None:
        if self._reference is None or self._probe is None:
            return
        name = node.weights["weight"]
        spec = self._graph.weights[name]
        expected_RK = self._reference.input(node)
        x_RK = _multiplied(node, spec.layout, quantized.input(node))
        comparison = LogitComparison(self._probe.following_R)
        error = _OutputError(node, spec.layout, weight.adjustment, expected_RK, len(expected_RK))
        for rows in row_chunks(*spec.shape):
            stored = weight.stored(rows)
            expected_RC = expected_RK @ weight.dense(rows).T
            found_RC = x_RK @ stored.T
            error.add(rows, stored, expected_RC, found_RC)
            comparison.add(rows.start, expected_RC, found_RC)
        self._block.append(WeightError(name, spec.layout, error.own, error.drift, 0.0))
        self._end_block(1.0)  # nothing is added to logits
        self._measurement = measurement_of(self._probe, comparison.finish(), self._errors)


class _OutputError:
    """A linear's relative errors, gathered over slices of its rows.

    Args:
        layout: of the weight.
        expected_TK: the unquantized inputs.
        num_probed: how many of the quantized rows belong to the same tokens, in the same order.
    """

    def __init__(
        self,
        node: Node,
        layout: str,
        adjustment: Adjustment,
        expected_TK: torch.Tensor,
        num_probed: int,
    ) -> None:
        step = max(len(expected_TK) // _SAMPLED_TOKENS, 1)
        self._sampled = slice(0, None, step)
        self._adjustment, self._num_probed = adjustment, num_probed
        self._x_TK = expected_TK[self._sampled]
        if adjustment.columns_K is not None:
            self._x_TK = self._x_TK / adjustment.columns_K
        self._x_TK = _multiplied(node, layout, self._x_TK)
        self._own = self._drift = self._norm = 0.0

    def add(
        self, rows: slice, stored: torch.Tensor, expected_TC: torch.Tensor, found_TC: torch.Tensor
    ) -> None:
        """Takes the outputs of some rows, stored as `stored`."""
        found_TC, own_TC = found_TC[: self._num_probed][self._sampled], self._x_TK @ stored.T
        if self._adjustment.rows_N is not None:
            found_TC = found_TC * self._adjustment.rows_N[rows]
            own_TC = own_TC * self._adjustment.rows_N[rows]
        sampled_TC = expected_TC[self._sampled]
        self._own += _square(own_TC - sampled_TC)
        self._norm += _square(sampled_TC)
        self._drift += _square(found_TC - sampled_TC)

    @property
    def own(self) -> float:
        """As in `WeightError.error`."""
        return _ratio(self._own, self._norm)

    @property
    def drift(self) -> float:
        """As in `WeightError.drift`."""
        return _ratio(self._drift, self._norm)


def _multiplied(node: Node, layout: str, x_TK: torch.Tensor) -> torch.Tensor:
    """The input as the engine's product for many tokens sees it: by e4m3 weights it is e4m3 too, with
    a scale for each token where calibration gave none."""
    if activations(node) or layout != "fp8_channel":
        return multiplied(node, x_TK)
    scale_T1 = x_TK.abs().amax(-1, keepdim=True).div_(FP8_MAX).clamp_(min=1e-30)
    return (x_TK / scale_T1).to(torch.float8_e4m3fn).float() * scale_T1


def _square(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values)) ** 2


def _ratio(error: float, norm: float) -> float:
    return (error / norm) ** 0.5 if norm else 0.0
