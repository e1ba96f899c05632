"""A graph's weights as dense tensors, straight from a checkpoint: what references run on."""

import torch

from compiler_service.checkpoints.checkpoint import Checkpoint
from shared.ir import Graph


def dense_weights(
    graph: Graph, checkpoint: Checkpoint, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Weight name to its joined parts in `dtype`."""
    return {
        name: torch.cat([checkpoint.read(part) for part in weight.parts]).to(dtype)
        for name, weight in graph.weights.items()
    }
