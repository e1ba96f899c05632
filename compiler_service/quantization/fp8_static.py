"""`fp8-static`: `fp8` with one activation scale for each linear, found by calibration: no pass over activations when
the model runs, and values beyond what the calibration saw are clipped.

    s = max |x| / 448 over the calibration text

The head rounds by tokens, as in `fp8`.

Legend: T tokens, K in.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch

from compiler_service.quantization.fp8 import FP8
from compiler_service.quantization.rescale import ScaleSource, choose_scales
from compiler_service.quantization.scheme import InputScale
from compiler_service.streaming import RowsOf
from kernels.linear.op import FP8_MAX, activations
from shared.ir import Graph, Node, WeightSpec

_LEAST = 1e-12


def largest_input(
    spec: WeightSpec,
    rows_of: RowsOf,
    x_TK: torch.Tensor,
    source: ScaleSource | None,
    gain_K: torch.Tensor | None,
) -> InputScale:
    """The largest value that the calibration text gives a linear to read."""
    return InputScale(largest=float(x_TK.abs().max()))


def with_input_scales(graph: Graph, scales: Mapping[str, InputScale]) -> Graph:
    """The graph with `input_scale` on every linear that rounds its input by a fixed scale."""

    def scaled(node: Node) -> Node:
        if node.op != "linear" or activations(node) != "fp8":
            return node
        largest = scales[node.weights["weight"]].largest
        return replace(node, attrs={**node.attrs, "input_scale": max(largest / FP8_MAX, _LEAST)})

    return replace(graph, nodes=tuple(map(scaled, graph.nodes)))


FP8_STATIC = replace(
    FP8, name="fp8-static", calibrate=choose_scales(largest_input), activations="fp8"
)
