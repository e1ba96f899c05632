"""Draws on a CPU. Legend: R rows, V vocabulary."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from kernels.cpu_jit import TAGS, address
from kernels.sampling import cpu_kernel


class Key(Protocol):
    """What a row's noise depends on, beside the token."""

    @property
    def words(self) -> tuple[int, int, int, int]:
        """Position, sample index and the seed's halves, low first, in 32 bits each."""


def draw_tokens(scores_RV: torch.Tensor, keys: Sequence[Key]) -> torch.Tensor:
    """The token [R] of the highest sum of score and noise.

    Args:
        scores_RV: fp32; -infinity where a token may not be drawn.
    """
    keys_R4 = torch.tensor([key.words for key in keys])
    drawn_R = torch.empty(len(keys), dtype=torch.int64)
    cpu_kernel.draw_tokens(
        address(scores_RV, torch.float32), keys_R4.data_ptr(), drawn_R.data_ptr(),
        *scores_RV.shape, TAGS[torch.float32], np.int64(0),
    )  # fmt: skip
    return drawn_R
