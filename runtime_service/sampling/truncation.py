"""Which tokens may be drawn: top-k, then top-p of what is left, then min-p, as one least score.

    top-k  scores at least as high as the k-th
    top-p  the likeliest tokens until their probabilities, among those that top-k left, reach p
    min-p  probabilities of at least min_p times the likeliest's

A token with the same score as the last one kept is kept: no order among equals is made up, so what
is kept depends on the scores alone. Source: Fan et al. 2018 (top-k); Holtzman et al. 2019 (top-p);
Nguyen et al. 2024 (min-p). Legend: R rows, V vocabulary, K tokens that are kept.

Rows are sorted whole, and by NumPy: its vector instructions sort 49,152 scores in less time than torch
takes to find the 1,024 highest.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from runtime_service.scheduling.request import SamplingParams


def truncates(params: SamplingParams) -> bool:
    """Claims that some tokens may be excluded."""
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def least_scores(scores_RV: torch.Tensor, rows: Sequence[SamplingParams]) -> torch.Tensor:
    """The score [R, 1] below which a row's tokens are not drawn."""
    least = [_least_score(scores_V, row) for scores_V, row in zip(scores_RV, rows, strict=True)]
    return torch.tensor(least)[:, None]


def _least_score(scores_V: torch.Tensor, row: SamplingParams) -> float:
    least = -math.inf
    if row.min_p > 0:
        least = float(scores_V.max() + math.log(row.min_p))
    if row.top_k > 0 or row.top_p < 1:
        sorted_V = np.sort(scores_V.numpy())[::-1]
        kept_K = sorted_V
        if 0 < row.top_k < len(sorted_V):
            kept_K = sorted_V[: np.count_nonzero(sorted_V >= sorted_V[row.top_k - 1])]
        if row.top_p < 1:
            kept_K = kept_K[: _num_of_top_p(kept_K, row.top_p)]
        least = max(least, float(kept_K[-1]))
    return least


def _num_of_top_p(kept_K: npt.NDArray[np.float32], top_p: float) -> int:
    """How many of these scores, from the highest on, it takes to reach `top_p` of what all of them weigh."""
    # fp64 so that 1e-7 does not decide; in one order, that of the scores, whatever the batch.
    mass_K = np.cumsum(np.exp(kept_K.astype(np.float64) - kept_K[0]))
    # Where rounding keeps the sum below p nothing is excluded.
    return min(int(np.searchsorted(mass_K, top_p * mass_K[-1])) + 1, len(kept_K))
