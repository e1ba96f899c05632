"""What the lowering of all ops knows of one walk over a graph."""

from collections.abc import Callable

from kernels.kv_cache import kv_format
from kernels.launch import Grid, Operand, Sizes, Temporary, Value
from kernels.linear import launch as linear
from kernels.operands import TRITON_DTYPES, integer, per_row, per_token
from kernels.ops import OPS
from kernels.regimes import Regime
from kernels.riding import Riding
from kernels.tuning import FUSED, LIBRARY, Choices, Site
from shared.arch import Arch
from shared.ir import Graph, Node


class Walk:
    """Graph, arch and regime, what rides on what in it, and what kernels leave for each other."""

    def __init__(self, graph: Graph, arch: Arch, regime: Regime, choices: Choices) -> None:
        self.graph = graph
        self.arch = arch
        self.regime = regime
        self.choices = choices
        # Parts in which the squares of a riding norm's input come, by the norm's first output.
        self.num_squares: dict[str, int] = {}
        self.dtype = TRITON_DTYPES[str(graph.config["dtype"])]
        self.kv_format = kv_format(graph)
        layouts = {weight.layout for weight in graph.weights.values()}
        unknown = layouts - set(linear.LAYOUTS)
        assert not unknown, f"{', '.join(sorted(unknown))} has no GPU form"
        # With the library's products a step of few tokens is made as one of many.
        self.max_tokens = 0 if self._uses_library() else regime.max_tokens
        self._specs = graph.infer(OPS)
        self.riding = Riding(graph, self.max_tokens)
        # Over codes a lone query waits for memory, several for what widens codes: no tile serves both.
        is_any_step = (
            not regime.max_tokens and not regime.max_sequences
        )  # of more than MOST_FEW_TOKENS
        self.attends_apart = self.kv_format.is_scaled and is_any_step

    def _uses_library(self) -> bool:
        linears = {n.weights["weight"] for n in self.graph.nodes if n.op == "linear"}
        layouts = {self.graph.weights[name].layout for name in linears}
        if self.regime.max_tokens <= 1 or not layouts <= set(linear.LIBRARY_LAYOUTS):
            return False
        site = Site("linears", self.regime.max_tokens)
        return self.choices.of(site, {FUSED: False, LIBRARY: True})

    def size_of(self, value: str) -> str:
        """The field of `Sizes` that says how many rows a value has."""
        return "rows" if self._specs[value].dims[0] == "R" else "tokens"

    def width_of(self, value: str) -> int:
        """The elements of a row."""
        return integer(self._specs[value].dims[-1])

    def per_row_of(self, value: str) -> Callable[[Sizes], Grid]:
        """A program for each row of a value."""
        return per_row if self.size_of(value) == "rows" else per_token

    def norm_operands(self, norm: Node, parts: int) -> list[Operand]:
        """Where the kernel before a riding norm leaves x * gain, and its squares in `parts`."""
        self.num_squares[norm.outputs[0]] = parts
        return [Value(norm.outputs[0]), self.squares(norm)]

    def squares(self, norm: Node) -> Temporary:
        """The sums of squares of a riding norm's input, a row of parts for each token."""
        name = norm.outputs[0]
        return Temporary(f"{name}.squares", "float32", self.num_squares[name])
