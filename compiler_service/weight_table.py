"""A graph's weights out of a checkpoint: do they fit, and the packing of them, a part at a time."""

from collections.abc import Iterable, Mapping

import torch

from compiler_service.checkpoints.checkpoint import Checkpoint, TensorInfo
from compiler_service.quantization.scheme import Adjustment, Pack
from kernels.linear.layouts import LAYOUTS
from shared.errors import InvalidModel
from shared.ir import Graph, WeightSpec

# Tensors that old checkpoints carry and that say nothing.
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".masked_bias", ".attn.bias")
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# Two tensors are compared in pieces of so many rows.
_COMPARED_ROWS = 4096


def require_tensors(graph: Graph, tensors: Mapping[str, TensorInfo]) -> None:
    """Checks that a checkpoint's tensors are those that the graph wants, and have its shapes.

    Raises:
        InvalidModel: one is missing, left over, or has another shape than config.json says.
    """
    wanted: dict[str, tuple[int, ...]] = {}
    for weight in graph.weights.values():
        for part, rows in zip(weight.parts, weight.part_rows, strict=True):
            wanted[part] = (rows, *weight.shape[1:])
    missing = sorted(set(wanted) - set(tensors))
    if missing:
        raise InvalidModel(problem=f"{_count(missing)} missing that config.json implies")
    for name, shape in wanted.items():
        found = tensors[name].shape
        if found != shape:
            raise InvalidModel(
                problem=f"{name} has shape {list(found)} and config.json implies {list(shape)}"
            )
    # A tied head is often stored again beside the embedding; `require_tied_head` holds them together.
    ignored = {_HEAD} if "lm_head" not in graph.weights else set()
    extra = sorted(
        name
        for name in set(tensors) - set(wanted) - ignored
        if not name.endswith(_IGNORED_SUFFIXES)
    )
    if extra:
        raise InvalidModel(problem=f"{_count(extra)} left over that config.json does not imply")


def require_tied_head(graph: Graph, checkpoint: Checkpoint) -> None:
    """Checks that a head which the graph ties to the embedding is not stored with other values.

    One that the checkpoint quantized is let be: it is the embedding, less exactly.

    Raises:
        InvalidModel: it is, so that leaving it out would be another model.
    """
    head = checkpoint.tensors.get(_HEAD)
    if "lm_head" in graph.weights or head is None or head.quantized is not None:
        return
    tied, stored = checkpoint.read(_EMBEDDING), checkpoint.read(_HEAD)
    pieces = (torch.split(tensor, _COMPARED_ROWS) for tensor in (tied, stored))
    pairs = zip(*pieces, strict=False)
    if tied.shape != stored.shape or not all(torch.equal(a.float(), b.float()) for a, b in pairs):
        raise InvalidModel(
            problem=f"{_HEAD} differs from {_EMBEDDING}, to which config.json ties it; set "
            "tie_word_embeddings to false there, or leave the tensor out"
        )


def weights_in_order(graph: Graph) -> list[str]:
    """Weight names in the order in which the graph first uses them: how they lie in an engine."""
    return list(dict.fromkeys(name for node in graph.nodes for name in node.weights.values()))


def stored_tensors(weight: WeightSpec) -> dict[str, tuple[tuple[int, ...], str]]:
    """Role to (shape, dtype) of what a weight's layout stores."""
    return LAYOUTS[weight.layout].roles(weight.shape, weight.dtype, weight.group_size)


def read_parts(checkpoint: Checkpoint, weight: WeightSpec) -> list[torch.Tensor]:
    """The checkpoint tensors that make a weight, as they are; views of files where they can be.

    Raises:
        InvalidModel: one holds NaN or infinity.
    """
    parts = []
    for name in weight.parts:
        parts.append(checkpoint.read(name))
        _require_finite(name, parts[-1])
    return parts


def pack_weight(
    weight: WeightSpec,
    parts: Iterable[torch.Tensor],
    adjustment: Adjustment | None = None,
    pack: Pack | None = None,
) -> dict[str, torch.Tensor]:
    """The packed tensors, by role, of a weight: its parts are packed one by one and joined.

    Args:
        adjustment: of the values, before they are packed.
        pack: chooses the values; None = the layout rounds each to its nearest.
    """
    layout = LAYOUTS[weight.layout]
    packed, first = [], 0
    for part in parts:
        rows = slice(first, first + len(part))
        first = rows.stop
        if adjustment is not None:
            part = _adjusted(part, rows, adjustment)
        if weight.layout == "plain":
            part = part.to(getattr(torch, weight.dtype))
        packed.append(layout.pack(part, weight.group_size) if pack is None else pack(part.float()))
    return _joined(packed)


def import_weight(checkpoint: Checkpoint, weight: WeightSpec) -> dict[str, torch.Tensor]:
    """The packed tensors, by role, of a weight that the checkpoint quantized: its own values.

    Raises:
        InvalidModel: a part holds NaN or infinity.
    """
    packed = []
    for part in weight.parts:
        tensors = checkpoint.read_packed(part)
        for tensor in tensors.values():
            if tensor.is_floating_point():  # codes are integers, most often
                _require_finite(part, tensor)
        packed.append(tensors)
    return _joined(packed)


def _joined(packed: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The parts' rows, one after another; a single part as it is."""
    if len(packed) == 1:
        return packed[0]
    return {role: torch.cat([tensors[role] for tensors in packed]) for role in packed[0]}


def _adjusted(part: torch.Tensor, rows: slice, adjustment: Adjustment) -> torch.Tensor:
    values = part.float()
    if adjustment.columns_K is not None:
        values = values * adjustment.columns_K
    if adjustment.rows_N is not None:
        divisor = adjustment.rows_N[rows]
        values = values / (divisor[:, None] if values.dim() == 2 else divisor)
    return values


def _require_finite(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype == torch.float8_e4m3fn:
        # Its NaNs have all bits but the sign set, and there is no infinity.
        if bool(((tensor.view(torch.uint8) & 127) == 127).any()):
            raise InvalidModel(problem=f"{name} holds NaN or infinity")
        return
    # The extremes of a tensor that holds NaN are NaN; one pass and no copy.
    extremes = torch.stack(torch.aminmax(tensor))
    if not bool(torch.isfinite(extremes).all()):
        raise InvalidModel(problem=f"{name} holds NaN or infinity")


def _count(names: list[str]) -> str:
    if len(names) == 1:
        return f"tensor {names[0]} is"
    return f"{len(names)} tensors, such as {names[0]}, are"
