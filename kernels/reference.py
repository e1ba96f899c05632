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
    going_on: Mapping[int, tuple[int, int]] | None = None,
) -> StepBatch:
    """A step that computes whole prompts of these lengths with a new cache: of the graph's 8 bits, or of `dtype`.

    Args:
        logit_rows: packed tokens whose logits are wanted; None wants every token's.
        going_on: by prompt, another one and how many of its first tokens, whole blocks of them, come before it.
            They are computed once, as the other's, and are no part of its own length.
    """
    going_on = going_on or {}
    before = [going_on.get(prompt, (0, 0))[1] for prompt in range(len(lengths))]
    assert not any(count % block_tokens for count in before), "prompts part within a block"
    blocks = [-(-length // block_tokens) for length in lengths]
    first = torch.tensor([0, *blocks]).cumsum(0)[:-1]
    widest = max(blocks) + max(before) // block_tokens
    # A prompt's own blocks come behind those that it shares.
    shift = torch.tensor(before) // block_tokens
    tables_SB = first[:, None] - shift[:, None] + torch.arange(widest)
    for prompt, (other, count) in going_on.items():
        shared = count // block_tokens
        tables_SB[prompt, :shared] = tables_SB[other, :shared]
    positions_T = torch.cat([torch.arange(length) for length in lengths])
    counts = torch.tensor(lengths)
    base_T = torch.repeat_interleave(first * block_tokens, counts)
    kept = kv_format(graph, str(dtype).removeprefix("torch."))
    rows = range(sum(lengths)) if logit_rows is None else logit_rows
    return StepBatch(
        positions_T=(positions_T + torch.repeat_interleave(torch.tensor(before), counts)).int(),
        slot_mapping_T=(base_T + positions_T).int(),
        block_tables_SB=tables_SB.clamp(max=sum(blocks) - 1).int(),
        seq_lens_S=(counts + torch.tensor(before)).int(),
        query_start_S1=torch.tensor([0, *lengths]).cumsum(0).int(),
        logit_rows_R=torch.tensor(list(rows), dtype=torch.int32),
        kv_caches=by_layer(kept.allocate(graph, sum(blocks), block_tokens)),
    )
