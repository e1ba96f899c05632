"""Draws a step's tokens on the device, into the token table and into one tensor that is read back."""

import torch

from kernels.launcher import KernelLibrary
from kernels.sampling.launch import (
    draw_best_variant,
    draw_random_variant,
    draw_truncated_variant,
    greedy_grid,
)
from kernels.step_inputs.layout import RANDOM, TRUNCATED
from runtime_service.execution.device_rows import DeviceRows, SentStep


class DeviceSampler:
    """The sampling kernels, bound to the rows.

    `drawn` [S] holds the token of each sequence that draws on the device; -1 where its logits are not finite.
    """

    def __init__(self, library: KernelLibrary, rows: DeviceRows, vocab_size: int) -> None:
        count, device = rows.layout.max_sequences, rows.message.device
        self.drawn = torch.zeros(count, dtype=torch.int32, device=device)
        self._best = torch.zeros(count, dtype=torch.int64, device=device)
        self._counters = torch.zeros(count, dtype=torch.int32, device=device)
        self._highest = torch.zeros(count, dtype=torch.float32, device=device)
        self._vocab_size = vocab_size
        self._draw_best = library.kernel(draw_best_variant(vocab_size))
        self._draw_random = library.kernel(draw_random_variant(vocab_size))
        self._draw_truncated = library.kernel(draw_truncated_variant(vocab_size))
        tensors = self._highest, self.drawn, rows.message, rows.tokens, rows.sampling
        self._arguments = (
            *(tensor.data_ptr() for tensor in tensors),
            rows.layout.max_sequences,
            rows.layout.tokens_stride,
        )
        self._scratch = self._best.data_ptr(), self._counters.data_ptr()

    def launch(self, logits_SV: torch.Tensor, step: SentStep) -> None:
        """Draws for every sequence of the step that was sent last; does not wait."""
        logits, grid = logits_SV.data_ptr(), greedy_grid(step.num_sequences, self._vocab_size)
        self._draw_best(grid, logits, *self._scratch, *self._arguments)
        if (step.modes == RANDOM).any():
            self._draw_random(grid, logits, *self._scratch, *self._arguments)
        if (step.modes == TRUNCATED).any():
            self._draw_truncated((step.num_sequences, 1, 1), logits, *self._arguments)
