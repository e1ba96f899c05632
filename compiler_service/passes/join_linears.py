"""Linears that read the same value become one linear and a split: q, k, v; gate, up."""

from dataclasses import replace

from shared.ir import Graph, Node, WeightSpec


def join_linears(graph: Graph) -> Graph:
    """The graph with one linear where several read one value; weights are joined along dim 0.

    Only linears that agree are joined: same columns, same shard dim, all with a bias or none.
    """
    siblings: dict[tuple[object, ...], list[Node]] = {}
    for node in graph.nodes:
        if node.op == "linear":
            siblings.setdefault(_kind(graph, node), []).append(node)
    joined_at: dict[str, list[Node]] = {}
    for group in siblings.values():
        if len(group) > 1:
            joined_at |= {node.outputs[0]: group for node in group}
    nodes: list[Node] = []
    new_weights: dict[str, WeightSpec] = {}
    for node in graph.nodes:
        joined = joined_at.get(node.outputs[0]) if node.op == "linear" else None
        if joined is None:
            nodes.append(node)
        elif node is joined[0]:
            nodes.extend(_join(graph, joined, new_weights))
    return graph.with_nodes(tuple(nodes), new_weights)


def _kind(graph: Graph, node: Node) -> tuple[object, ...]:
    """What linears must share to be joined."""
    weight = graph.weights[node.weights["weight"]]
    return node.inputs, weight.shape[1:], weight.dtype, weight.shard_dim, "bias" in node.weights


def _join(graph: Graph, group: list[Node], new_weights: dict[str, WeightSpec]) -> tuple[Node, Node]:
    weights = {}
    for role in group[0].weights:
        names = [node.weights[role] for node in group]
        name = _joined_name(names)
        new_weights[name] = _concatenated([graph.weights[n] for n in names])
        weights[role] = name
    sizes = tuple(graph.weights[node.weights["weight"]].shape[0] for node in group)
    value = f"{weights['weight']}_out"
    linear = Node("linear", group[0].inputs, (value,), weights)
    outputs = tuple(node.outputs[0] for node in group)
    return linear, Node("split", (value,), outputs, attrs={"sizes": sizes})


def _joined_name(names: list[str]) -> str:
    """`layers.0.q`, `layers.0.k`, `layers.0.v` -> `layers.0.qkv`; `gate`, `up` -> `gate_up`."""
    where, first = names[0].rsplit(".", 1) if "." in names[0] else ("", names[0])
    if first == "bias":
        stems = [name.removesuffix(".bias") for name in names]
        return f"{_joined_name(stems)}.bias"
    stems = [name.rsplit(".", 1)[-1] for name in names]
    separator = "" if all(len(stem) == 1 for stem in stems) else "_"
    return f"{where}.{separator.join(stems)}" if where else separator.join(stems)


def _concatenated(specs: list[WeightSpec]) -> WeightSpec:
    return replace(
        specs[0],
        shape=(sum(s.shape[0] for s in specs), *specs[0].shape[1:]),
        parts=tuple(part for s in specs for part in s.parts),
        part_rows=tuple(rows for s in specs for rows in s.part_rows),
    )
