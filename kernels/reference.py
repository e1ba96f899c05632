"""Runs a whole graph by its ops' references: what a graph means.

Legend: T packed tokens, S sequences, N out, K in.
"""

from collections.abc import Mapping, Sequence

import torch

from kernels.batch import StepBatch
from kernels.kv_cache import by_layer, kv_format
from kernels.linear.layouts import LAYOUTS
from kernels.ops import OPS
from shared.ir import Graph


def run(
    graph: Graph,
    dense_weights: Mapping[str, torch.Tensor],
    token_ids_T: torch.Tensor,
    batch: StepBatch,
) -> dict[str, torch.Tensor]:
    """The graph's outputs by name. Weights in fp64 make all of it fp64.

    Args:
        dense_weights: logical weights by name, as `dense` gives them.
        batch: its caches are written to; `prompt_batch` makes one for whole prompts.
    """
    values = {"token_ids": token_ids_T}
    for node in graph.nodes:
        weights = {role: dense_weights[name] for role, name in node.weights.items()}
        inputs = [values[name] for name in node.inputs]
        outputs = OPS[node.op].reference(node, inputs, weights, batch)
        values.update(zip(node.outputs, outputs, strict=True))
    return {name: values[name] for name in graph.outputs}


def dense(
    graph: Graph,
    packed: Mapping[str, Mapping[str, torch.Tensor]],
    dtype: torch.dtype | None = None,
) -> dict[str, torch.Tensor]:
    """Logical weights by name out of packed tensors by name and role.

    Args:
        dtype: of all of them; None gives fp32, in which every layout's values are exact.
    """
    return {
        name: LAYOUTS[weight.layout].unpack(packed[name]).to(dtype or torch.float32)
        for name, weight in graph.weights.items()
    }


def prompt_batch(
    graph: Graph,
    lengths: Sequence[int],
    dtype: torch.dtype = torch.float32,
    *,
    block_tokens: int = 16,
    logit_rows: Sequence[int] | None = None,
) -> StepBatch:
    """A step that computes whole prompts of these lengths with a new cache: of the graph's 8 bits, or of `dtype`.

    Args:
        logit_rows: packed tokens whose logits are wanted; None wants every token's.
    """
    blocks = [-(-length // block_tokens) for length in lengths]
    first = torch.tensor([0, *blocks]).cumsum(0)[:-1]
    tables_SB = first[:, None] + torch.arange(max(blocks))
    positions_T = torch.cat([torch.arange(length) for length in lengths])
    base_T = torch.repeat_interleave(first * block_tokens, torch.tensor(lengths))
    kept = kv_format(graph, str(dtype).removeprefix("torch."))
    rows = range(sum(lengths)) if logit_rows is None else logit_rows
    return StepBatch(
        positions_T=positions_T.int(),
        slot_mapping_T=(base_T + positions_T).int(),
        block_tables_SB=tables_SB.clamp(max=sum(blocks) - 1).int(),
        seq_lens_S=torch.tensor(lengths, dtype=torch.int32),
        query_start_S1=torch.tensor([0, *lengths]).cumsum(0).int(),
        logit_rows_R=torch.tensor(list(rows), dtype=torch.int32),
        kv_caches=by_layer(kept.allocate(graph, sum(blocks), block_tokens)),
    )
