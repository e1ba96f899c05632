"""What decides an engine's graph, and so its bytes, beyond the passes and schemes themselves.

Part of every key (fingerprints.py): it imports no kernels, so that an edited GPU kernel leaves the keys
of other arches alone.
"""

from collections.abc import Mapping
from dataclasses import replace

from compiler_service.checkpoints.checkpoint import TensorInfo
from compiler_service.passes import run_passes
from compiler_service.quantization import scheme_named
from compiler_service.quantization.as_is import AS_IS, keep_as_stored, note_requantized
from shared.engine import QuantConfig
from shared.ir import Graph, ShapeRule


def engine_graph(
    source: Graph,
    tensors: Mapping[str, TensorInfo],
    quant: QuantConfig,
    ops: Mapping[str, ShapeRule],
) -> Graph:
    """The graph that the engine runs: after all passes, every weight's layout chosen.

    Args:
        source: as the family lowered it.
        tensors: the checkpoint's.
    Raises:
        UnsupportedQuant: `quant` asks for what cannot be done.
    """
    graph = run_passes(source, ops)
    if quant.kv_cache:
        graph = replace(graph, config={**graph.config, "kv_cache": quant.kv_cache})
    if quant.scheme == AS_IS:
        return keep_as_stored(graph, tensors, quant)
    return note_requantized(scheme_named(quant).apply(graph, quant), tensors, quant)


def imported_weights(graph: Graph, quant: QuantConfig) -> frozenset[str]:
    """The names of weights whose packed values are the checkpoint's own."""
    if quant.scheme != AS_IS:
        return frozenset()
    return frozenset(name for name, weight in graph.weights.items() if weight.layout != "plain")
