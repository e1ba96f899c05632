"""What a build does, decided before it reads a weight: printable, testable."""

from dataclasses import dataclass

from compiler_service.quantization.as_is import notes_of
from shared.engine import EngineKey
from shared.ir import Graph


@dataclass(frozen=True, slots=True)
class BuildPlan:
    """All decisions of a build, no bytes of weights.

    Args:
        source: the graph as the family lowered it.
        graph: the graph that the engine runs: after all passes, every weight's layout chosen.
        weight_names: in the order in which they are stored.
        files: what the engine carries for tokenizing and chatting, by name.
        imported: names of weights whose packed values are the checkpoint's own.
        read_bytes: bytes of the checkpoint that will be read.
        stored_bytes: bytes of packed weights that will be written.
    """

    key: EngineKey
    model: str
    source: Graph
    graph: Graph
    weight_names: tuple[str, ...]
    files: dict[str, bytes]
    imported: frozenset[str]
    read_bytes: int
    stored_bytes: int

    def to_text(self) -> str:
        """For people: what is built, what becomes of the graph, how weights are stored."""
        layouts: dict[str, int] = {}
        for name in self.weight_names:
            layout = self.graph.weights[name].layout
            layouts[layout] = layouts.get(layout, 0) + 1
        return "\n".join(
            [
                f"engine   {self.key.digest}",
                f"model    {self.model} ({self.graph.config['family']})",
                f"target   {self.key.arch}, {self.key.quant}",
                f"graph    {len(self.source.nodes)} nodes -> {len(self.graph.nodes)}",
                f"weights  {', '.join(f'{count} {name}' for name, count in layouts.items())}",
                f"bytes    {self.read_bytes:,} read, {self.stored_bytes:,} stored",
                f"files    {', '.join(self.files)}",
                *(f"note     {note}" for note in notes_of(self.graph)),
            ]
        )
