"""How a scheme stores a model's weights: a layout per weight, decided by who reads it."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from shared.arch import ARCHES, Arch
from shared.engine import QuantConfig
from shared.errors import UnsupportedQuant
from shared.ir import Graph, WeightSpec


@dataclass(frozen=True, slots=True)
class QuantScheme:
    """One way to store a model.

    Args:
        activation_dtype: dtype of activations and of everything stored `plain`.
        linear_layout: of the matrices inside the layers.
        embedding_layout: of the token embedding, also where it is the LM head as well.
        head_layout: of an LM head of its own.
        runs_on: claims that kernels for this scheme exist on an arch.
        group_sizes: values per scale that may be asked for, the default first; empty = no groups.
    """

    name: str
    activation_dtype: str
    linear_layout: str
    embedding_layout: str
    head_layout: str
    runs_on: Callable[[Arch], bool]
    group_sizes: tuple[int, ...] = ()

    def resolve(self, quant: QuantConfig) -> QuantConfig:
        """`quant` with its group size filled in, so that a default and its value are one key.

        Raises:
            UnsupportedQuant: the scheme has no such groups.
        """
        if not self.group_sizes:
            if quant.group_size:
                raise UnsupportedQuant(quant=str(quant), problem=f"{self.name} has no groups")
            return quant
        size = quant.group_size or self.group_sizes[0]
        if size not in self.group_sizes:
            known = ", ".join(map(str, sorted(self.group_sizes)))
            raise UnsupportedQuant(quant=str(quant), problem=f"groups may have {known} values")
        return QuantConfig(self.name, size)

    def require_arch(self, quant: QuantConfig, arch: Arch) -> None:
        """Checks that the scheme runs on `arch`.

        Raises:
            UnsupportedQuant: it does not; names the arches that can.
        """
        if not self.runs_on(arch):
            able = ", ".join(row.name for row in ARCHES.values() if self.runs_on(row))
            raise UnsupportedQuant(
                quant=str(quant), problem=f"{arch.name} cannot run it; {able} can"
            )

    def apply(self, graph: Graph, quant: QuantConfig) -> Graph:
        """The graph with every weight's layout chosen; nodes stay as they are.

        Raises:
            UnsupportedQuant: groups do not divide a weight's columns.
        """
        layouts = self._layouts(graph)
        weights = {}
        for name, weight in graph.weights.items():
            layout = layouts.get(name, "plain")
            weights[name] = _stored(name, weight, layout, quant)
        return replace(graph, weights=weights)

    def _layouts(self, graph: Graph) -> dict[str, str]:
        """Layout by weight name; the embedding's reading decides where a weight is tied."""
        layouts: dict[str, str] = {}
        for node in graph.nodes:
            if node.op == "linear":
                is_head = node.outputs[0] in graph.outputs
                layout = self.head_layout if is_head else self.linear_layout
                layouts.setdefault(node.weights["weight"], layout)
        for node in graph.nodes:
            if node.op == "embedding":
                layouts[node.weights["weight"]] = self.embedding_layout
        return layouts


def _stored(name: str, weight: WeightSpec, layout: str, quant: QuantConfig) -> WeightSpec:
    if layout != "int4_group":
        return replace(weight, layout=layout)
    if weight.shape[1] % quant.group_size:
        problem = f"{name} has {weight.shape[1]} columns, which groups do not divide"
        raise UnsupportedQuant(quant=str(quant), problem=problem)
    return replace(weight, layout=layout, group_size=quant.group_size)
