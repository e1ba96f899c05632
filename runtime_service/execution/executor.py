"""The seam between the model runner and a device: what runs a graph there, and draws tokens."""

from typing import Protocol

import torch

from kernels.batch import StepBatch


class Executor(Protocol):
    """A graph bound to its weights, and its KV cache, on a device."""

    def forward(self, token_ids_T: torch.Tensor, batch: StepBatch) -> torch.Tensor:
        """One step.

        Args:
            batch: without `kv_caches`, which the executor owns and fills in.
        Returns:
            Logits [R, V] of `batch.logit_rows_R`, fp32; the caller may write to them.
        """

    def copy_blocks(self, copies: tuple[tuple[int, int], ...]) -> None:
        """Copies whole KV blocks, (source, destination) each, in all layers."""
