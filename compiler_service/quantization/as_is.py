"""`as-is`: a checkpoint's own quantization, kept value for value where a layout of ours holds it.

Also says what became of a quantized checkpoint under any scheme, for people: the lines are in the
graph's config, so the engine carries them and `millrace inspect` shows them.
"""

from collections.abc import Mapping
from dataclasses import replace

from compiler_service.checkpoints.checkpoint import Checkpoint, Quantized, TensorInfo
from shared.engine import QuantConfig
from shared.errors import UnsupportedQuant
from shared.ir import Graph, WeightSpec

AS_IS = "as-is"
NOTES = "checkpoint_quantization"

Tensors = Mapping[str, TensorInfo]


def own_scheme(checkpoint: Checkpoint) -> str:
    """The scheme that changes nothing about a checkpoint: what an unset one stands for."""
    if any(info.quantized is not None for info in checkpoint.tensors.values()):
        return AS_IS
    return checkpoint.float_format


def keep_as_stored(graph: Graph, tensors: Tensors, quant: QuantConfig) -> Graph:
    """The graph with the layout of every weight that the checkpoint quantized; others stay plain.

    Parts of one weight are joined packed where they agree on layout and group size; where they do
    not, or no layout holds them, the weight is dequantized. The graph's notes say so.

    Raises:
        UnsupportedQuant: no weight of the checkpoint is quantized.
    """
    own = {name: _own_layout(weight, tensors) for name, weight in graph.weights.items()}
    if not any(
        tensors[part].quantized for weight in graph.weights.values() for part in weight.parts
    ):
        problem = "the checkpoint is not quantized; ask for bf16, int8, int4 or another scheme"
        raise UnsupportedQuant(quant=str(quant), problem=problem)
    weights = {
        name: weight
        if (found := own[name]) is None
        else replace(weight, layout=found.layout, group_size=found.group_size)
        for name, weight in graph.weights.items()
    }
    fates: dict[tuple[str, str], int] = {}
    for name, weight in weights.items():
        for stored in _quantized_parts(weight, tensors):
            fate = f"dequantized to {weight.dtype}: no layout holds it"
            if own[name] is not None:
                fate = f"kept exactly as {_layout_text(weight)}"
            elif stored.layout:
                fate = f"dequantized to {weight.dtype}: {_mixed_text(weight, tensors)}"
            fates[stored.format, fate] = fates.get((stored.format, fate), 0) + 1
    return _with_notes(replace(graph, weights=weights), fates)


def note_requantized(graph: Graph, tensors: Tensors, quant: QuantConfig) -> Graph:
    """The graph of another scheme, with a note where the checkpoint was quantized before."""
    fates: dict[tuple[str, str], int] = {}
    for weight in graph.weights.values():
        for stored in _quantized_parts(weight, tensors):
            fate = f"dequantized to {weight.dtype}"
            if weight.layout != "plain":
                fate = f"dequantized and quantized again as {_layout_text(weight)}"
            fate = f"{fate}; what {stored.format} lost stays lost ({AS_IS} keeps it as it is)"
            fates[stored.format, fate] = fates.get((stored.format, fate), 0) + 1
    return _with_notes(graph, fates)


def notes_of(graph: Graph) -> tuple[str, ...]:
    """What became of the checkpoint's own quantization, a line each; empty where it had none."""
    notes = graph.config.get(NOTES, ())
    assert isinstance(notes, tuple), f"{NOTES} is {notes!r}"
    return tuple(str(note) for note in notes)


def _own_layout(weight: WeightSpec, tensors: Tensors) -> Quantized | None:
    """The layout and group size that all parts of the weight are stored in, if they share one."""
    stored = [tensors[part].quantized for part in weight.parts]
    first = stored[0]
    if first is None or not first.layout:
        return None
    same = all(
        s is not None and (s.layout, s.group_size) == (first.layout, first.group_size)
        for s in stored
    )
    return first if same else None


def _quantized_parts(weight: WeightSpec, tensors: Tensors) -> list[Quantized]:
    return [q for part in weight.parts if (q := tensors[part].quantized) is not None]


def _layout_text(weight: WeightSpec) -> str:
    return f"{weight.layout} {weight.group_size}" if weight.group_size else weight.layout


def _mixed_text(weight: WeightSpec, tensors: Tensors) -> str:
    kinds = [getattr(tensors[part].quantized, "format", "floats") for part in weight.parts]
    return f"it is joined with {', '.join(dict.fromkeys(kinds))}"


def _with_notes(graph: Graph, fates: Mapping[tuple[str, str], int]) -> Graph:
    if not fates:
        return graph
    notes = tuple(
        f"{stored}: {count} tensor{'s' if count > 1 else ''} {fate}"
        for (stored, fate), count in sorted(fates.items())
    )
    return replace(graph, config={**graph.config, NOTES: notes})
