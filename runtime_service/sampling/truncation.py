"""Which tokens may be drawn: top-k, then top-p of what is left, then min-p, as one least score.

    top-k  scores at least as high as the k-th
    top-p  the likeliest tokens until their probabilities, among those that top-k left, reach p
    min-p  probabilities of at least min_p times the likeliest's

A token with the same score as the last one kept is kept: no order among equals is made up, so what
is kept depends on the scores alone. Source: Fan et al. 2018 (top-k); Holtzman et al. 2019 (top-p);
Nguyen et al. 2024 (min-p). Legend: V vocabulary, K tokens that are kept.

Only a row's highest scores are put into order: to select them takes NumPy a third of the time that sorting all takes,
whose running sums take eight times as long as that.
"""

import math

import numpy as np
import numpy.typing as npt

from runtime_service.scheduling.request import SamplingParams

Scores = npt.NDArray[np.float32]

# Top-p of most rows ends within so many tokens.
_HEADS = 4096, 32_768


def truncates(params: SamplingParams) -> bool:
    """Claims that some tokens may be excluded."""
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def least_score(scores_V: Scores, row: SamplingParams) -> float:
    """The score below which a row's tokens are not drawn."""
    least = -math.inf
    kept_K = scores_V
    if row.min_p > 0:
        least = float(scores_V.max() + math.log(row.min_p))
    if 0 < row.top_k < len(scores_V):
        highest_V = np.partition(scores_V, -row.top_k)
        least = max(least, float(highest_V[-row.top_k]))
        kept_K = scores_V[scores_V >= highest_V[-row.top_k]]
    if row.top_p < 1:
        least = max(least, _least_of_top_p(kept_K, row.top_p))
    return least


def _least_of_top_p(kept_K: Scores, top_p: float) -> float:
    """The least of the highest scores that weigh `top_p` of what all of them do."""
    best = kept_K.max()
    mass = np.exp(kept_K - best).sum(dtype=np.float64)
    for num_tokens in (*(head for head in _HEADS if head < len(kept_K)), len(kept_K)):
        highest = np.partition(kept_K, -num_tokens)[-num_tokens:]
        highest = np.sort(highest)[::-1]
        sums = np.cumsum(np.exp(highest.astype(np.float64) - best))
        place = int(np.searchsorted(sums, top_p * mass))
        if place < num_tokens:
            return float(highest[place])
    return float(highest[-1])  # rounding keeps the sum below p: nothing is excluded
