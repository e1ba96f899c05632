"""The stages of a build that decide what its weights are: calibrate, quantize, quality.

calibrate  the scheme looks at the text through the unquantized graph, where it has to
quantize   weights are packed and written; both graphs run along over held-out text
quality    the difference is held against the limits; beyond them, layers to keep are sought
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from compiler_service.build_plan import BuildPlan
from compiler_service.calibration.text import read_calibration_text
from compiler_service.calibration.windows import TextTokenizer, cut_windows
from compiler_service.checkpoints.checkpoint import Checkpoint
from compiler_service.quality.gate import exceeded, fewest_kept, gate_error
from compiler_service.quality.needle import DEFAULT_PROBE_TOKENS, most_tokens
from compiler_service.quality.probe import Probe, make_probe
from compiler_service.quality.report import QUALITY_TITLE, Measurement, report_json
from compiler_service.quantization import scheme_named
from compiler_service.quantization.fp8_static import with_input_scales
from compiler_service.quantization.rescale import fold_scales
from compiler_service.quantization.scheme import InputScale
from compiler_service.quantize import GraphQuantizer, Packed
from compiler_service.streaming import RowsOf, dense_rows
from compiler_service.weight_table import read_parts
from shared.engine import QUALITY_TYPE, Blob
from shared.ir import Graph
from shared.store.local import LocalStore
from shared.store.weights import WeightWriter

Enter = Callable[[str, int], None]
"""Told the stage that begins, and how many bytes of the checkpoint it reads."""


@dataclass(frozen=True, slots=True)
class QuantizedWeights:
    """The graph with the layouts that it got, and the layers of its weights and their report."""

    graph: Graph
    layers: tuple[Blob, ...]


def quantize_weights(
    store: LocalStore,
    build_plan: BuildPlan,
    checkpoint: Checkpoint,
    calibration_uri: str,
    enter: Enter,
    on_bytes: Callable[[int], None],
) -> QuantizedWeights:
    """The weights of `build_plan`, packed, measured and in the store.

    Raises:
        QualityGate: they cost more than the recipe allows; says what to keep.
        InvalidField: the calibration text cannot be used.
        InvalidModel: a tensor holds NaN or infinity, or the tokenizer is of another model.
    """
    work = _Work(store, build_plan, checkpoint, calibration_uri, enter, on_bytes)
    return work.run()


class _Work:
    def __init__(
        self,
        store: LocalStore,
        build_plan: BuildPlan,
        checkpoint: Checkpoint,
        calibration_uri: str,
        enter: Enter,
        on_bytes: Callable[[int], None],
    ) -> None:
        self._store, self._plan, self._checkpoint = store, build_plan, checkpoint
        self._enter, self._on_bytes = enter, on_bytes
        self._quant = build_plan.key.quant
        self._scheme = scheme_named(self._quant)
        self._probe: Probe | None = None
        self._calibration: tuple[torch.Tensor, ...] = ()
        if self._quant.calibration_digest:
            self._read_text(calibration_uri)

    def run(self) -> QuantizedWeights:
        graph = self._plan.graph
        scales: Mapping[str, InputScale] = {}
        if self._scheme.calibrate is not None:
            self._enter("calibrate", self._plan.read_bytes)
            scales = self._scheme.calibrate(graph, self._calibration, self._rows_of, self._used)
            graph = self._scheme_graph(frozenset(), scales)
        self._enter("quantize", self._plan.read_bytes)
        layers, measurement = self._write(graph, scales)
        if measurement is None:
            return QuantizedWeights(graph, layers)
        self._enter("quality", 0)
        auto_kept = self._auto_kept(scales, measurement)
        if auto_kept:
            graph = self._scheme_graph(auto_kept, scales)
            self._enter("quality", self._plan.read_bytes)
            layers, measurement = self._write(graph, scales)
            assert measurement is not None, "the second pass measured nothing"
        plain = self._scheme.layouts(graph)
        kept = [name for name in plain if graph.weights[name].layout == "plain" != plain[name]]
        looked_at = sum(map(len, self._calibration))
        report = report_json(measurement, self._quant, looked_at, kept, sorted(auto_kept))
        blob = self._store.write_blob([report], QUALITY_TYPE, QUALITY_TITLE)
        return QuantizedWeights(graph, (*layers, blob))

    def _read_text(self, uri: str) -> None:
        config = self._plan.graph.config
        tokenizer = TextTokenizer(self._plan.files, int(str(config["vocab_size"])))
        max_positions = int(str(config["max_position_embeddings"]))
        documents = read_calibration_text(uri, self._quant.calibration_digest)
        tokens = self._quant.calibration_tokens
        windows = cut_windows(documents, tokenizer, max_positions, tokens)
        self._calibration = tuple(window.token_ids for window in windows.calibration)
        if not self._quant.skip_quality:
            self._probe = make_probe(
                windows,
                tokenizer,
                self._quant.probe_tokens or DEFAULT_PROBE_TOKENS,
                max_positions,
                most_tokens(self._plan.graph),
            )

    def _auto_kept(
        self, scales: Mapping[str, InputScale], measurement: Measurement
    ) -> frozenset[str]:
        """The weights to keep beside those asked for; none where the limits are met.

        Raises:
            QualityGate: they are not, and nothing may be kept, or nothing helps.
        """
        problem = exceeded(measurement, self._quant)
        if not problem:
            return frozenset()

        assert self._probe is not None, "something was measured without a probe"
        windows = self._probe.windows_alone()

        def measure(kept: frozenset[str]) -> Measurement:
            self._enter("quality", self._plan.read_bytes)
            found = self._pass(self._scheme_graph(kept, scales), scales, None, windows)
            assert found is not None, "a pass with a probe measured nothing"
            return found

        if self._scheme.limits is None:  # the cache alone is beyond them
            raise gate_error(self._quant, problem, measurement, None)
        found = fewest_kept(
            measurement.worst, measure, lambda other: not exceeded(other, self._quant)
        )
        if found is None or not self._quant.auto_keep:
            raise gate_error(self._quant, problem, measurement, found)
        return found.weights

    def _write(
        self, graph: Graph, scales: Mapping[str, InputScale]
    ) -> tuple[tuple[Blob, ...], Measurement | None]:
        with WeightWriter(self._store) as writer:
            measurement = self._pass(graph, scales, writer.add, self._probe)
            return writer.finish(), measurement

    def _scheme_graph(self, kept: frozenset[str], scales: Mapping[str, InputScale]) -> Graph:
        """The graph with `kept` in bf16 too, and what calibration found written on its nodes."""
        graph = self._plan.graph
        if kept:
            graph = self._scheme.apply(graph, self._quant, kept)
        return with_input_scales(graph, scales)

    def _pass(
        self,
        graph: Graph,
        scales: Mapping[str, InputScale],
        write: Callable[[str, Packed], None] | None,
        probe: Probe | None,
    ) -> Measurement | None:
        quantizer = GraphQuantizer(
            self._checkpoint,
            graph,
            self._scheme,
            fold_scales(graph, scales),
            probe,
            self._calibration,
            self._plan.imported,
        )
        return quantizer.run(write, self._used)

    def _rows_of(self, name: str) -> RowsOf:
        return dense_rows(read_parts(self._checkpoint, self._plan.graph.weights[name]))

    def _used(self, name: str) -> None:
        parts = self._plan.graph.weights[name].parts
        self._on_bytes(sum(self._checkpoint.tensors[part].num_bytes for part in parts))
