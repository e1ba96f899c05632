"""How a scheme stores a model's weights: a layout per weight, and how each one's values are chosen."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from compiler_service.calibration.windows import DEFAULT_CALIBRATION_TOKENS
from compiler_service.quality.needle import (
    DEFAULT_PROBE_TOKENS,
    MAX_PROBE_TOKENS,
    MIN_PROBE_TOKENS,
)
from compiler_service.quantization.keep import kept_weights
from compiler_service.streaming import RowsOf
from kernels.kv_cache import EIGHT_BIT_FORMATS
from shared.arch import ARCHES, Arch
from shared.engine import QuantConfig
from shared.errors import UnsupportedQuant
from shared.ir import Graph, Node, WeightSpec


@dataclass(frozen=True, slots=True)
class Adjustment:
    """What a scheme does to a weight's values before they are packed: w'[n, k] = w[n, k] c[k] / r[n].

    The graph computes the same, as what makes the input divides it by c, and what reads the output
    expects it divided by r. Legend: N out, K in.

    Args:
        rows_N, columns_K: fp32, r and c; None = all 1.
        importance_K: fp32, how much an error in a column of w' costs; None = unknown.
    """

    rows_N: torch.Tensor | None = None
    columns_K: torch.Tensor | None = None
    importance_K: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class InputScale:
    """What a scheme found out about a linear's input channels.

    Args:
        scale_K: fp32, what its columns are multiplied with and its input divided by; None = 1.
        importance_K: fp32, mean square of the input, after it is divided.
        largest: max |x| of the input; 0 = unknown.
    """

    scale_K: torch.Tensor | None = None
    importance_K: torch.Tensor | None = None
    largest: float = 0.0


class Calibrate(Protocol):
    """What is found out about linears, by weight name, from a run of the unquantized graph.

    `rows_of(name)` reads a weight; `on_weight` is told each weight's name once it was used.
    """

    def __call__(
        self,
        graph: Graph,
        texts: Sequence[torch.Tensor],
        rows_of: Callable[[str], RowsOf],
        on_weight: Callable[[str], None],
    ) -> Mapping[str, InputScale]: ...


Pack = Callable[[torch.Tensor], dict[str, torch.Tensor]]
"""Some rows [N, K] of a weight to the tensors of its layout, by role."""


class PreparePack(Protocol):
    """How a linear's rows are packed, from what is known of its inputs.

    Args:
        inputs_TK: what the linear reads in the quantized graph; None unless the scheme asks.
        importance_K: as in `Adjustment`.
    """

    def __call__(
        self, group_size: int, inputs_TK: torch.Tensor | None, importance_K: torch.Tensor | None
    ) -> Pack: ...


@dataclass(frozen=True, slots=True)
class QualityLimits:
    """How much worse than the unquantized model an engine may be, unless asked otherwise.

    Args:
        max_kl: mean KL divergence, nats a token.
        max_perplexity_increase: as a share.
    """

    max_kl: float
    max_perplexity_increase: float


# What a scheme may cost by default: 1.3 to 5 times what those of its kind that pass cost SmolLM2-135M, but for an int8
# cache (docs/QUANTIZATION.md), whose small layers suffer more than those of larger models. Over 512 tokens a
# perplexity's increase has a standard error of about sqrt(2 KL / 512): limits closer to it would be decided by chance.
EIGHT_BITS = QualityLimits(max_kl=0.05, max_perplexity_increase=0.05)
EIGHT_BIT_INPUTS = QualityLimits(max_kl=0.1, max_perplexity_increase=0.1)
# e4m3 has 4 significant bits, where an integer has 7 beside its sign.
E4M3_INPUTS = QualityLimits(max_kl=0.2, max_perplexity_increase=0.1)
FOUR_BITS = QualityLimits(max_kl=0.5, max_perplexity_increase=0.5)


@dataclass(frozen=True, slots=True)
class QuantScheme:
    """One way to store a model.

    Args:
        activation_dtype: dtype of activations and of everything stored `plain`.
        linear_layout: of the matrices inside the layers.
        embedding_layout: of the token embedding, also where it is the LM head as well.
        head_layout: of an LM head of its own.
        runs_on: claims that kernels for this scheme exist on an arch.
        limits: of the quality gate; None where no weight is quantized (an 8-bit cache has EIGHT_BITS).
        group_sizes: values per scale that may be asked for, the default first; empty = no groups.
        calibrate: adjusts weights before any is packed.
        prepare_pack: chooses the values of linears inside the layers; None = each to its nearest.
        prepare_in_order: `prepare_pack` for recipes of no act-order; None = no order is chosen.
        reads_inputs: `prepare_pack` wants the linear's inputs.
        activations: how the inputs of quantized linears inside the layers are rounded; see `linear`.
        nearest: the scheme to take where this one cannot run.
    """

    name: str
    activation_dtype: str
    linear_layout: str
    embedding_layout: str
    head_layout: str
    runs_on: Callable[[Arch], bool]
    limits: QualityLimits | None = None
    group_sizes: tuple[int, ...] = ()
    calibrate: Calibrate | None = None
    prepare_pack: PreparePack | None = None
    prepare_in_order: PreparePack | None = None
    reads_inputs: bool = False
    activations: str = ""
    nearest: str = "int8"

    @property
    def calibrates(self) -> bool:
        """Claims that weights depend on the calibration text."""
        return self.calibrate is not None or self.reads_inputs

    def needs_text(self, quant: QuantConfig) -> bool:
        """Claims that a build with this recipe calibrates or measures."""
        return self.calibrates or self.measures(quant)

    def measures(self, quant: QuantConfig) -> bool:
        """Claims that a build with this recipe is measured: weights or the KV cache lose something."""
        return self._loses(quant) and not quant.skip_quality

    def _loses(self, quant: QuantConfig) -> bool:
        return self.limits is not None or bool(quant.kv_cache)

    def resolve(self, quant: QuantConfig) -> QuantConfig:
        """`quant` with its defaults filled in, so that a default and its value are one key.

        Raises:
            UnsupportedQuant: the scheme has no such groups, or not what is asked of it.
        """
        if quant.kv_cache and quant.kv_cache not in EIGHT_BIT_FORMATS:
            known = ", ".join(EIGHT_BIT_FORMATS)
            problem = f"the KV cache may be {known}, or stay as it is, and not {quant.kv_cache!r}"
            raise UnsupportedQuant(quant=self.name, problem=problem)
        if quant.no_act_order and self.prepare_in_order is None:
            problem = "no_act_order is for int4-gptq, which alone rounds columns in an order"
            raise UnsupportedQuant(quant=str(quant), problem=problem)
        limits = self._limits(quant)
        return replace(
            quant,
            group_size=self._group_size(quant),
            calibration_tokens=self._calibration_tokens(quant),
            max_kl=limits.max_kl,
            max_perplexity_increase=limits.max_perplexity_increase,
            probe_tokens=self._probe_tokens(quant),
        )

    def _probe_tokens(self, quant: QuantConfig) -> int:
        if not self.measures(quant):
            if quant.probe_tokens:
                problem = "nothing is measured, so probe_tokens says nothing"
                raise UnsupportedQuant(quant=str(quant), problem=problem)
            return 0
        tokens = quant.probe_tokens or DEFAULT_PROBE_TOKENS
        if tokens == DEFAULT_PROBE_TOKENS:
            return 0  # not spelled out: runtimes from before the field read such engines
        if not MIN_PROBE_TOKENS <= tokens <= MAX_PROBE_TOKENS:
            problem = f"probe_tokens may be {MIN_PROBE_TOKENS} to {MAX_PROBE_TOKENS}, not {tokens}"
            raise UnsupportedQuant(quant=str(quant), problem=problem)
        return tokens

    def _group_size(self, quant: QuantConfig) -> int:
        if not self.group_sizes:
            if quant.group_size:
                raise UnsupportedQuant(quant=str(quant), problem=f"{self.name} has no groups")
            return 0
        size = quant.group_size or self.group_sizes[0]
        if size not in self.group_sizes:
            known = ", ".join(map(str, sorted(self.group_sizes)))
            raise UnsupportedQuant(quant=str(quant), problem=f"groups may have {known} values")
        return size

    def _calibration_tokens(self, quant: QuantConfig) -> int:
        if self.calibrates:
            return quant.calibration_tokens or DEFAULT_CALIBRATION_TOKENS
        if quant.calibration_tokens:
            problem = f"{self.name} looks at no tokens, so calibration_tokens says nothing"
            raise UnsupportedQuant(quant=str(quant), problem=problem)
        return 0

    def _limits(self, quant: QuantConfig) -> QualityLimits:
        asked = quant.max_kl or quant.max_perplexity_increase or quant.auto_keep
        if not self._loses(quant):
            if asked or quant.keep or quant.skip_quality:
                problem = (
                    f"{self.name} quantizes nothing, so there is nothing to keep or to measure"
                )
                raise UnsupportedQuant(quant=str(quant), problem=problem)
            return QualityLimits(0.0, 0.0)
        if self.limits is None and (quant.keep or quant.auto_keep):
            problem = f"{self.name} quantizes no weights, so there is nothing to keep"
            raise UnsupportedQuant(quant=str(quant), problem=problem)
        if quant.skip_quality:
            if asked:
                problem = "limits and auto_keep need the measurement that skip_quality leaves out"
                raise UnsupportedQuant(quant=str(quant), problem=problem)
            return QualityLimits(0.0, 0.0)
        limits = self.limits or EIGHT_BITS
        return QualityLimits(
            quant.max_kl or limits.max_kl,
            quant.max_perplexity_increase or limits.max_perplexity_increase,
        )

    def require_arch(self, quant: QuantConfig, arch: Arch) -> None:
        """Checks that the scheme runs on `arch`.

        Raises:
            UnsupportedQuant: it does not; names the arches that can, and the nearest scheme.
        """
        if not self.runs_on(arch):
            able = ", ".join(row.name for row in ARCHES.values() if self.runs_on(row))
            problem = f"{arch.name} cannot run it; {able} can; on {arch.name} take {self.nearest}"
            raise UnsupportedQuant(quant=str(quant), problem=problem)

    def apply(
        self, graph: Graph, quant: QuantConfig, also_kept: frozenset[str] = frozenset()
    ) -> Graph:
        """The graph with every weight's layout chosen, and how linears round their inputs.

        Args:
            also_kept: weights that stay plain beside those that `quant` keeps.

        Raises:
            UnsupportedQuant: groups do not divide a weight's columns, or a pattern matches nothing.
        """
        layouts = self.layouts(graph)
        quantized = [name for name, layout in layouts.items() if layout != "plain"]
        kept = kept_weights(graph, quant, quantized) | also_kept
        weights = {
            name: _stored(
                name,
                weight,
                "plain" if name in kept else layouts.get(name, "plain"),
                quant,
                self.group_sizes,
            )
            for name, weight in graph.weights.items()
        }
        nodes = tuple(self._rounding_inputs(node, graph, weights) for node in graph.nodes)
        return replace(graph, nodes=nodes, weights=weights)

    def _rounding_inputs(self, node: Node, graph: Graph, weights: Mapping[str, WeightSpec]) -> Node:
        attrs = {
            name: value
            for name, value in node.attrs.items()
            if name not in ("activations", "input_scale")
        }
        is_inside = node.op == "linear" and node.outputs[0] not in graph.outputs
        if self.activations and is_inside and weights[node.weights["weight"]].layout != "plain":
            attrs["activations"] = self.activations
        return replace(node, attrs=attrs)

    def layouts(self, graph: Graph) -> dict[str, str]:
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


def _stored(
    name: str, weight: WeightSpec, layout: str, quant: QuantConfig, sizes: Sequence[int]
) -> WeightSpec:
    if layout != "int4_group":
        return replace(weight, layout=layout)
    if weight.shape[1] % quant.group_size:
        able = [str(size) for size in sorted(sizes) if weight.shape[1] % size == 0]
        other = f"groups of {' or '.join(able)} do" if able else "take int8, which has no groups"
        problem = (
            f"{name} has {weight.shape[1]} columns, which groups of {quant.group_size} do not "
            f"divide; {other}"
        )
        raise UnsupportedQuant(quant=str(quant), problem=problem)
    return replace(weight, layout=layout, group_size=quant.group_size)
