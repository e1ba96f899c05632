"""Which tokens may be drawn: top-k, then top-p of what is left, then min-p, as one least score.

    top-k  scores at least as high as the k-th
    top-p  the likeliest tokens until their probabilities, among those that top-k left, reach p
    min-p  probabilities of at least min_p times the likeliest's

A token with the same score as the last one kept is kept: no order among equals is made up, so what
is kept depends on the scores alone. Source: Fan et al. 2018 (top-k); Holtzman et al. 2019 (top-p);
Nguyen et al. 2024 (min-p). Legend: R rows, V vocabulary, C likeliest tokens that are looked at.
"""

import math
from collections.abc import Sequence

import torch

from runtime_service.scheduling.request import SamplingParams

_FEW_TOKENS = 1024


def truncates(params: SamplingParams) -> bool:
    """Claims that some tokens may be excluded."""
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def least_scores(scores_RV: torch.Tensor, rows: Sequence[SamplingParams]) -> torch.Tensor:
    """The score [R, 1] below which a row's tokens are not drawn."""
    vocab_size = scores_RV.shape[1]
    top_k = [min(row.top_k or vocab_size, vocab_size) for row in rows]
    wanted = max((k for row, k in zip(rows, top_k, strict=True) if row.top_k), default=1)
    if any(row.top_p < 1 for row in rows):
        wanted = max(wanted, _FEW_TOKENS)
    top_RC = scores_RV.topk(min(wanted, vocab_size)).values
    least = torch.full((len(rows), 1), -math.inf)
    for index, (row, k) in enumerate(zip(rows, top_k, strict=True)):
        if row.top_k:
            least[index] = top_RC[index, k - 1]
        if row.top_p < 1:
            score = _top_p_score(scores_RV[index], top_RC[index], least[index], row.top_p)
            least[index] = torch.maximum(least[index], score)
        if row.min_p > 0:
            least[index] = torch.maximum(least[index], top_RC[index, 0] + math.log(row.min_p))
    return least


def _top_p_score(
    scores_V: torch.Tensor, top_C: torch.Tensor, least: torch.Tensor, top_p: float
) -> torch.Tensor:
    """The score of the last token that top-p keeps."""
    kept_V = scores_V.masked_fill(scores_V < least, -math.inf)
    # softmax is summed in one order whatever the batch; fp64 so that 1e-7 does not decide.
    highest = top_C[0].double()
    total = (kept_V.double() - highest).exp_().sum()
    while True:
        mass_C = (top_C.double() - highest).exp_().div_(total).cumsum(0)
        reached = (mass_C >= top_p).nonzero()
        if len(reached):
            return top_C[reached[0, 0]]
        if len(top_C) == len(scores_V):
            return top_C[-1]  # rounding kept the sum below p: nothing is excluded
        top_C = scores_V.sort(descending=True).values
