"""Graph to graph, pure, meaning-preserving; the pipeline is this table, in order."""

from collections.abc import Callable, Mapping

from compiler_service.passes.fuse_elementwise import fuse_add_norm, fuse_silu_mul
from compiler_service.passes.fuse_qkv_rope_write import fuse_qkv_rope_write
from compiler_service.passes.join_linears import join_linears
from compiler_service.passes.remove_dead_code import remove_dead_code
from shared.ir import Graph, ShapeRule

PIPELINE: tuple[Callable[[Graph], Graph], ...] = (
    join_linears,
    fuse_silu_mul,
    fuse_qkv_rope_write,
    fuse_add_norm,
    remove_dead_code,
)


def run_passes(graph: Graph, ops: Mapping[str, ShapeRule]) -> Graph:
    """The graph after every pass, verified after each.

    Raises:
        AssertionError: a pass broke a rule; names the pass.
    """
    graph.verify(ops)
    for run_pass in PIPELINE:
        graph = run_pass(graph)
        try:
            graph.verify(ops)
        except AssertionError as error:
            raise AssertionError(f"after {run_pass.__name__}: {error}") from error
    return graph
