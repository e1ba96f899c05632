"""Nodes that nothing depends on go."""

from shared.ir import Graph


def remove_dead_code(graph: Graph) -> Graph:
    """The graph with only what its outputs need; a cache write counts as read by its attention."""
    needed = set(graph.outputs)
    kept = []
    for node in reversed(graph.nodes):
        if needed.intersection(node.outputs):
            kept.append(node)
            needed.update(node.inputs)
    return graph.with_nodes(tuple(reversed(kept)))
