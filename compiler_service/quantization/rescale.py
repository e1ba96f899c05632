"""Scales on a linear's input channels, undone by what makes the input: the same arithmetic for the
model, an easier one for its numbers. AWQ and SmoothQuant choose them; this file knows where in a
graph they can be undone.

    x is made by       undone in
    rms_norm           its gain
    silu_mul           the rows of `up`: silu(gate) * up is linear in up
    attention          the rows of v; query heads that share a key-value head share its scales

Legend: K in, N out, H query heads, D head dim.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from compiler_service.quantization.scheme import Adjustment, Calibrate, InputScale
from compiler_service.streaming import RowsOf, Stream
from kernels.op import integer
from shared.ir import Graph, Node, WeightSpec


@dataclass(frozen=True, slots=True)
class ScaleSource:
    """What makes a linear's input, where scales on it can be undone.

    Args:
        node: whose weight takes them up: an rms_norm, or the linear of gate and up, or of q, k, v.
        first_row: of that weight's rows that make the input.
        num_shared: neighbours of `head_dim` columns that are made by the same rows.
        head_dim: 0 where `num_shared` is 1.
    """

    node: Node
    first_row: int = 0
    num_shared: int = 1
    head_dim: int = 0

    def shared(self, values_K: torch.Tensor) -> torch.Tensor:
        """`values_K`, each replaced by the mean of those that are made by the same row."""
        if self.num_shared == 1:
            return values_K
        grouped = values_K.view(-1, self.num_shared, self.head_dim)
        return grouped.mean(1, keepdim=True).expand_as(grouped).reshape(-1)

    def rows(self, values_K: torch.Tensor) -> torch.Tensor:
        """One value for each row that makes the input, where values are shared."""
        if self.num_shared == 1:
            return values_K
        return values_K.view(-1, self.num_shared, self.head_dim)[:, 0].reshape(-1)


def scale_sources(graph: Graph) -> dict[str, ScaleSource]:
    """By name of its weight, the source of each linear whose input can be scaled."""
    made_by = {name: node for node in graph.nodes for name in node.outputs}
    readers: dict[str, int] = {}
    for node in graph.nodes:
        for name in node.inputs:
            readers[name] = readers.get(name, 0) + 1
    found = {}
    for node in graph.nodes:
        if node.op != "linear" or node.inputs[0] not in made_by or readers[node.inputs[0]] > 1:
            continue
        source = _source(made_by[node.inputs[0]], made_by, graph)
        if source is not None:
            found[node.weights["weight"]] = source
    return found


def _source(maker: Node, made_by: Mapping[str, Node], graph: Graph) -> ScaleSource | None:
    if maker.op == "rms_norm":
        return ScaleSource(maker)
    if maker.op == "silu_mul":
        linear = made_by[maker.inputs[0]]
        return ScaleSource(linear, graph.weights[linear.weights["weight"]].shape[0] // 2)
    if maker.op == "attention":
        write = made_by[maker.inputs[1]]
        if write.op != "qkv_rope_write":
            return None
        heads, kv_heads = integer(maker, "num_heads"), integer(maker, "num_kv_heads")
        head_dim = integer(maker, "head_dim")
        first = (heads + kv_heads) * head_dim
        return ScaleSource(made_by[write.inputs[0]], first, heads // kv_heads, head_dim)
    return None


def exact_for_gain(scale_K: torch.Tensor, gain_K: torch.Tensor) -> torch.Tensor:
    """The scales next to `scale_K` that leave a norm's gain a bf16 number: nothing is rounded then."""
    scaled = (gain_K / scale_K).bfloat16().float()
    return torch.where(scaled != 0, gain_K / scaled, torch.ones_like(scaled))


class ChooseScale(Protocol):
    """What a scheme finds out about one linear.

    Args:
        spec, rows_of: its weight.
        x_TK: its input in the unquantized graph.
        source: where scales on the input are undone; None = nowhere, so there can be none.
        gain_K: of the norm that makes the input; None where no norm does.
    """

    def __call__(
        self,
        spec: WeightSpec,
        rows_of: RowsOf,
        x_TK: torch.Tensor,
        source: ScaleSource | None,
        gain_K: torch.Tensor | None,
    ) -> InputScale: ...


def choose_scales(choose: ChooseScale) -> Calibrate:
    """A calibration that asks `choose` about every quantized linear inside the layers."""

    def calibrate(
        graph: Graph,
        texts: Sequence[torch.Tensor],
        rows_of: Callable[[str], RowsOf],
        on_weight: Callable[[str], None],
    ) -> Mapping[str, InputScale]:
        sources, stream = scale_sources(graph), Stream(graph, texts)
        found: dict[str, InputScale] = {}
        for node in graph.nodes:
            if node.outputs[0] in graph.outputs:
                break
            weights = {role: rows_of(name) for role, name in node.weights.items()}
            name = node.weights.get("weight", "")
            if node.op == "linear" and graph.weights[name].layout != "plain":
                source = sources.get(name)
                gain_K = None
                if source is not None and source.node.op == "rms_norm":
                    gain_K = rows_of(source.node.weights["weight"])(slice(None))
                x_TK = stream.squarable_input(node)
                found[name] = choose(graph.weights[name], weights["weight"], x_TK, source, gain_K)
            stream.run(node, weights)
            for used in node.weights.values():
                on_weight(used)
        return found

    return calibrate


def fold_scales(graph: Graph, scales: Mapping[str, InputScale]) -> dict[str, Adjustment]:
    """What scales on linears' inputs do to weights, by name; linears that stay plain have none."""
    sources = scale_sources(graph)
    adjustments: dict[str, Adjustment] = {}
    for name, chosen in scales.items():
        if graph.weights[name].layout == "plain":
            continue
        before = adjustments.get(name, Adjustment())
        adjustments[name] = replace(before, importance_K=chosen.importance_K)
        if chosen.scale_K is None:
            continue
        adjustments[name] = replace(adjustments[name], columns_K=chosen.scale_K)
        source = sources[name]
        undone_N = source.rows(chosen.scale_K)
        for weight in source.node.weights.values():
            rows_N = torch.ones(graph.weights[weight].shape[0])
            rows_N[source.first_row : source.first_row + len(undone_N)] = undone_N
            adjustments[weight] = replace(adjustments.get(weight, Adjustment()), rows_N=rows_N)
    return adjustments
