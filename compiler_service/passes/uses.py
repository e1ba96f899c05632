"""Who makes and who reads each value: what every pattern match asks."""

from dataclasses import dataclass

from shared.ir import Graph, Node


@dataclass(frozen=True, slots=True)
class Uses:
    """The makers and readers of a graph's values.

    Args:
        maker: the node that defines a value; graph inputs have none.
        readers: the nodes that read a value, in order.
        kept: values that the graph gives out, which no pass may take away.
    """

    maker: dict[str, Node]
    readers: dict[str, list[Node]]
    kept: frozenset[str]

    @staticmethod
    def of(graph: Graph) -> "Uses":
        """The uses in `graph` as it stands."""
        maker = {name: node for node in graph.nodes for name in node.outputs}
        readers: dict[str, list[Node]] = {name: [] for name in (*graph.inputs, *maker)}
        for node in graph.nodes:
            for name in dict.fromkeys(node.inputs):
                readers[name].append(node)
        return Uses(maker, readers, frozenset(graph.outputs))

    def made_by(self, value: str, op: str) -> Node | None:
        """The node that makes `value`, if it is an `op`."""
        node = self.maker.get(value)
        return node if node is not None and node.op == op else None

    def only_reader(self, value: str, op: str) -> Node | None:
        """The one node that reads `value`, if there is just one and it is an `op`."""
        readers = self.readers[value]
        if value in self.kept or len(readers) != 1 or readers[0].op != op:
            return None
        return readers[0]
