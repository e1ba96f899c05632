"""Rows whose logits are wanted are selected as early as a graph allows: what follows runs on them alone.

Of a prompt's tokens only the last one's logits are wanted, and after a model's last attention no row reads another: its
output projection and its MLP, nearly all of the last layer's products, need no other row.
"""

from dataclasses import replace

from kernels.ops import OPS
from shared.ir import Graph, Node


def select_rows_early(graph: Graph) -> Graph:
    """The graph with `select_rows` before the row-wise ops whose results nothing else reads."""
    late = _late_values(graph)
    selected = {
        name: f"{name}.rows"
        for node in graph.nodes
        if not late.isdisjoint(node.outputs)
        for name in node.inputs
        if name not in late
    }
    replaced: dict[str, str] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        if node.op == "select_rows" and node.inputs[0] in late:
            replaced[node.outputs[0]] = node.inputs[0]
            continue
        names = replaced if late.isdisjoint(node.outputs) else selected
        nodes.append(replace(node, inputs=tuple(names.get(name, name) for name in node.inputs)))
        # As soon as they are there: a product may add a residual in place, before the node that adds it in the graph.
        nodes += [
            Node("select_rows", (name,), (selected[name],))
            for name in node.outputs
            if name in selected
        ]
    return graph.with_nodes(tuple(nodes))


def _late_values(graph: Graph) -> set[str]:
    """Values that only the selection reads, directly or by way of row-wise ops."""
    readers: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)
    late: set[str] = set()
    for node in reversed(graph.nodes):
        users = [user for name in node.outputs for user in readers.get(name, ())]
        if (
            OPS[node.op].is_row_wise
            and users
            and not set(graph.outputs).intersection(node.outputs)
            and all(u.op == "select_rows" or not late.isdisjoint(u.outputs) for u in users)
        ):
            late.update(node.outputs)
    return late
