"""Logits to tokens, on the packed rows of a step.

    order   non-finite check, log probabilities of the raw logits, end tokens masked before
            min_new_tokens, logit bias, penalties, temperature, truncation, noise, argmax

A row's token depends on its own logits, parameters and history alone, never on the batch. Rows that
take the likeliest token as it stands, which is most, cost one pass over the logits.

Legend: R rows, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from runtime_service.sampling.noise import DrawTokens, NoiseKey, draw_tokens
from runtime_service.sampling.token_counts import TokenCounts, Tokens, has_penalties
from runtime_service.sampling.truncation import least_score, truncates
from runtime_service.scheduling.output import TokenLogprobs
from runtime_service.scheduling.request import SamplingParams, StopParams

# Below it fp32 has fewer bits, and at last none.
_LEAST_TEMPERATURE = torch.finfo(torch.float32).tiny


class NonFiniteLogits(FloatingPointError):
    """The model gave NaN or infinity: the engine cannot go on."""


class RowSampler:
    """How one row draws its tokens, and what it has to remember for that."""

    __slots__ = ("counts", "is_plain", "num_prompt_tokens", "params", "sample_index", "stop")

    def __init__(
        self,
        params: SamplingParams,
        stop: StopParams,
        sample_index: int,
        num_prompt_tokens: int,
        vocab_size: int,
    ) -> None:
        self.params = params
        self.stop = stop
        self.sample_index = sample_index
        self.num_prompt_tokens = num_prompt_tokens
        self.counts = TokenCounts(vocab_size, num_prompt_tokens) if has_penalties(params) else None
        self.is_plain = (
            params.temperature == 0
            and params.num_logprobs is None
            and not params.logit_bias
            and self.counts is None
            and not (stop.min_new_tokens and stop.end_token_ids)
        )


@dataclass(frozen=True, slots=True)
class Draw:
    """A token to be drawn. `tokens`: all of the row so far; its position is their number."""

    row: RowSampler
    tokens: Tokens


def sample(
    logits_RV: torch.Tensor, draws: Sequence[Draw], draw_tokens: DrawTokens = draw_tokens
) -> tuple[list[int], list[TokenLogprobs | None]]:
    """A token for each row, and its log probabilities where they are asked for.

    Args:
        logits_RV: fp32; changed.
    Raises:
        NonFiniteLogits: a row holds NaN or +infinity, or nothing but -infinity.
    """
    best_R, token_ids_R = logits_RV.max(-1)  # a NaN anywhere in a row is its maximum
    if not all(map(math.isfinite, best_R.tolist())):
        raise NonFiniteLogits("the model's logits are not finite")
    if all(draw.row.is_plain for draw in draws):
        return token_ids_R.tolist(), [None] * len(draws)
    scored = [i for i, draw in enumerate(draws) if draw.row.params.num_logprobs is not None]
    raw_RV = logits_RV[scored] if scored else None
    for index, draw in enumerate(draws):
        if not draw.row.is_plain:
            _adjust(logits_RV[index], draw)
    token_ids_R = _draw(logits_RV, draws, draw_tokens)
    logprobs: list[TokenLogprobs | None] = [None] * len(draws)
    if raw_RV is not None:
        num_top = [draws[i].row.params.num_logprobs or 0 for i in scored]
        entries = token_logprobs(raw_RV, token_ids_R[scored], num_top)
        for index, entry in zip(scored, entries, strict=True):
            logprobs[index] = entry
    return token_ids_R.tolist(), logprobs


def token_logprobs(
    logits_RV: torch.Tensor, token_ids_R: torch.Tensor, num_top: Sequence[int]
) -> list[TokenLogprobs]:
    """How likely each row's token was, and the row's likeliest tokens."""
    logprobs_RV = logits_RV.log_softmax(-1)
    chosen_R1 = logprobs_RV.gather(1, token_ids_R.long()[:, None])
    ranks = (logprobs_RV > chosen_R1).sum(-1).add_(1).tolist()
    values, ids = logprobs_RV.topk(min(max(num_top, default=0), logits_RV.shape[1]))
    return [
        TokenLogprobs(token, logprob, rank, tuple(zip(top_ids[:n], top_values[:n], strict=True)))
        for token, logprob, rank, top_ids, top_values, n in zip(
            token_ids_R.tolist(),
            chosen_R1[:, 0].tolist(),
            ranks,
            ids.tolist(),
            values.tolist(),
            num_top,
            strict=True,
        )
    ]


def _adjust(logits_V: torch.Tensor, draw: Draw) -> None:
    """What changes a row's logits before its temperature; in place."""
    row, params = draw.row, draw.row.params
    end_ids, num_new = row.stop.end_token_ids, len(draw.tokens) - row.num_prompt_tokens
    if end_ids and num_new < row.stop.min_new_tokens:
        logits_V[list(end_ids)] = -math.inf
    if params.logit_bias:
        ids, values = zip(*params.logit_bias, strict=True)
        logits_V.index_add_(0, torch.tensor(ids), torch.tensor(values, dtype=torch.float32))
    if row.counts is not None:
        row.counts.apply(logits_V, draw.tokens, params)


def _draw(logits_RV: torch.Tensor, draws: Sequence[Draw], draw_tokens: DrawTokens) -> torch.Tensor:
    rows = [i for i, draw in enumerate(draws) if draw.row.params.temperature > 0]
    if len(rows) == len(draws):  # a copy of all would be paid for page by page
        return _draw_random(logits_RV, draws, draw_tokens)
    token_ids_R = logits_RV.argmax(-1)
    if rows:
        token_ids_R[rows] = _draw_random(logits_RV[rows], [draws[i] for i in rows], draw_tokens)
    return token_ids_R


def _draw_random(
    logits_RV: torch.Tensor, draws: Sequence[Draw], draw_tokens: DrawTokens
) -> torch.Tensor:
    """Changes the logits into scores."""
    params = [draw.row.params for draw in draws]
    temperatures_R1 = torch.tensor([[max(p.temperature, _LEAST_TEMPERATURE)] for p in params])
    # Relative to the best: the smallest temperature gives 0 and -infinity, never NaN.
    scores_RV = logits_RV.sub_(logits_RV.amax(-1, keepdim=True)).div_(temperatures_R1)
    for scores_V, row in zip(scores_RV, params, strict=True):
        if truncates(row):
            least = np.float32(least_score(scores_V.numpy(), row))
            # Excludes what is not above its threshold.
            torch.threshold_(scores_V, float(np.nextafter(least, -np.inf)), -math.inf)
    keys = [NoiseKey(d.row.params.seed, d.row.sample_index, len(d.tokens)) for d in draws]
    return draw_tokens(scores_RV, keys)
