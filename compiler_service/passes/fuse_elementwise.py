"""Element-wise work joins the op beside it: add + norm, silu * up."""

from dataclasses import replace

from compiler_service.passes.uses import Uses
from shared.ir import Graph, Node


def fuse_add_norm(graph: Graph) -> Graph:
    """`x = add(residual, y); n = rms_norm(x)` -> `n, x = rms_norm{residual}(y, residual)`.

    The sum stays a value: the next residual reads it.
    """
    uses = Uses.of(graph)
    fused: dict[str, Node] = {}
    for node in graph.nodes:
        if node.op != "rms_norm" or node.attrs["residual"] or node.attrs["head_dim"]:
            continue
        total = uses.made_by(node.inputs[0], "add")
        if total is None or total.outputs[0] in fused:
            continue
        residual, y = total.inputs
        fused[total.outputs[0]] = replace(
            node,
            inputs=(y, residual),
            outputs=(node.outputs[0], total.outputs[0]),
            attrs={**node.attrs, "residual": True},
        )
    # The fused node takes the add's place, before every reader of the sum; its norm is later or
    # here, so nothing reads a value too early.
    absorbed = {node.outputs[0] for node in fused.values()}
    nodes = []
    for node in graph.nodes:
        if node.op == "add" and node.outputs[0] in fused:
            nodes.append(fused[node.outputs[0]])
        elif not (node.op == "rms_norm" and node.outputs[0] in absorbed):
            nodes.append(node)
    return graph.with_nodes(tuple(nodes))


def fuse_silu_mul(graph: Graph) -> Graph:
    """`gate, up = split(x); mul(silu(gate), up)` -> `silu_mul(x)`."""
    uses = Uses.of(graph)
    nodes = []
    gone: set[str] = set()
    for node in graph.nodes:
        match = _gated(uses, node)
        if match is None:
            nodes.append(node)
            continue
        split, silu = match
        gone |= {*split.outputs, *silu.outputs}
        nodes.append(Node("silu_mul", split.inputs, node.outputs))
    return graph.with_nodes(tuple(n for n in nodes if not gone.intersection(n.outputs)))


def _gated(uses: Uses, node: Node) -> tuple[Node, Node] | None:
    """The split and silu behind a `mul(silu(gate), up)` whose halves nobody else reads."""
    silu = uses.made_by(node.inputs[0], "silu") if node.op == "mul" else None
    if silu is None or uses.only_reader(silu.outputs[0], "mul") is None:
        return None
    gate, up = silu.inputs[0], node.inputs[1]
    split = uses.made_by(gate, "split")
    if split is None or split.outputs != (gate, up) or len(set(_sizes(split))) != 1:
        return None
    if uses.only_reader(gate, "silu") is None or uses.only_reader(up, "mul") is None:
        return None
    return split, silu


def _sizes(split: Node) -> tuple[int, ...]:
    sizes = split.attrs["sizes"]
    assert isinstance(sizes, tuple), "split has no sizes"
    return tuple(int(size) for size in sizes)
