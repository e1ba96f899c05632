"""Words between the host's pinned memory and the device, in the order of the device's work."""

import torch

from kernels.launcher import KernelLibrary
from kernels.step_inputs.launch import copy_words_grid, copy_words_variant


class WordCopy:
    """A kernel that copies: between two kernels it costs a launch, where a copy of the driver's has to wait for another
    engine of the device, and the next kernel for that engine."""

    def __init__(self, library: KernelLibrary) -> None:
        self._kernel = library.kernel(copy_words_variant())

    def __call__(self, source: torch.Tensor, destination: torch.Tensor, count: int) -> None:
        """Launches a copy of the first `count` words, int32, and does not wait."""
        if count:
            grid = copy_words_grid(count)
            self._kernel(grid, source.data_ptr(), destination.data_ptr(), count)
