"""Which weights stay in bf16: patterns over the names that people know them by."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from shared.engine import QuantConfig
from shared.errors import UnsupportedQuant
from shared.ir import Graph


def kept_weights(graph: Graph, quant: QuantConfig, quantized: Iterable[str]) -> frozenset[str]:
    """The names of the weights among `quantized` that `quant.keep` matches.

    A pattern is matched with a weight's name in the graph (`layers.0.qkv`), with those of its
    parts in the checkpoint (`model.layers.0.self_attn.q_proj`), and with `lm_head` where it is the
    head. What is one weight in the graph is kept as a whole.

    Raises:
        UnsupportedQuant: a pattern matches none; names it.
    """
    names = _known_names(graph, quantized)
    kept: set[str] = set()
    for pattern in quant.keep:
        found = {
            weight
            for weight, known in names.items()
            if any(fnmatchcase(name, pattern) for name in known)
        }
        if not found:
            some = ", ".join(list(names)[:4])
            problem = f"keep {pattern!r} matches no weight that is quantized, such as {some}"
            raise UnsupportedQuant(quant=str(quant), problem=problem)
        kept |= found
    return frozenset(kept)


def _known_names(graph: Graph, quantized: Iterable[str]) -> Mapping[str, Sequence[str]]:
    heads = {
        node.weights["weight"]
        for node in graph.nodes
        if node.op == "linear" and node.outputs[0] in graph.outputs
    }
    return {
        weight: (
            weight,
            *(part.removesuffix(".weight") for part in graph.weights[weight].parts),
            *(("lm_head",) if weight in heads else ()),
        )
        for weight in quantized
    }
