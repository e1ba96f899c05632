"""Logits to tokens on torch operators: what `cpu` runs, and what device samplers are held to.

Each row is drawn by itself, from its own parameters and its own noise, so that no row's token
depends on the rows beside it. The order of the steps is the field's:

    bias, penalties, end tokens masked, temperature, top-k, top-p, min-p, Gumbel-max

Legend: R rows that draw, V vocabulary, N candidates left.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from runtime_service.sampling.logprobs import token_logprobs
from runtime_service.sampling.noise import gumbel
from runtime_service.scheduling.output import NewSequence, SampledSequence, TokenLogprobs
from runtime_service.scheduling.request import SamplingParams

# Candidates looked at before the whole vocabulary is sorted for top-p.
_LIKELY = 1024


class NonFiniteLogits(Exception):
    """A row of logits holds NaN or infinity: the step's numbers cannot be trusted."""


class Draw(NamedTuple):
    """One token to draw: for `row`, at absolute `position`, which is the drawn token's own."""

    row: int
    position: int


@dataclass(slots=True)
class _Row:
    """What one sequence's draws depend on.

    Args:
        end_token_ids: masked before `first_end_position`.
        seen_V, counts_V: tokens of prompt and output, and how often each is in the output; only
            where a penalty asks for them.
    """

    params: SamplingParams
    sample_index: int
    end_token_ids: torch.Tensor
    first_end_position: int
    bias: tuple[torch.Tensor, torch.Tensor] | None
    seen_V: torch.Tensor | None
    counts_V: torch.Tensor | None

    @property
    def is_plain_greedy(self) -> bool:
        """Claims that the likeliest raw logit is the answer."""
        return (
            self.params.temperature == 0
            and self.bias is None
            and self.seen_V is None
            and self.counts_V is None
        )


class Sampler:
    """Draws tokens for rows; knows each row's parameters and what it has produced.

    Args:
        vocab_size: V of the logits.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._rows: dict[int, _Row] = {}

    def add(self, sequence: NewSequence) -> None:
        """Begins `sequence.row`, with counts of all that is known of it."""
        params = sequence.sampling
        bias = None
        if params.logit_bias:
            ids, values = zip(*params.logit_bias, strict=True)
            bias = torch.tensor(ids), torch.tensor(values, dtype=torch.float32)
        seen_V = counts_V = None
        if params.repetition_penalty != 1.0:
            seen_V = torch.zeros(self._vocab_size, dtype=torch.bool)
            seen_V[torch.tensor(sequence.token_ids)] = True
        if params.presence_penalty or params.frequency_penalty:
            output = torch.tensor(
                sequence.token_ids[sequence.num_prompt_tokens :], dtype=torch.long
            )
            counts_V = torch.bincount(output, minlength=self._vocab_size).float()
        stop = sequence.stop
        self._rows[sequence.row] = _Row(
            params,
            sequence.sample_index,
            torch.tensor(stop.end_token_ids, dtype=torch.long),
            sequence.num_prompt_tokens + stop.min_new_tokens,
            bias,
            seen_V,
            counts_V,
        )

    def drop(self, row: int) -> None:
        """Forgets `row`."""
        del self._rows[row]

    def sample(self, logits_RV: torch.Tensor, draws: list[Draw]) -> tuple[SampledSequence, ...]:
        """One token per draw, in order; counts it as produced.

        Args:
            logits_RV: one row per draw, any float dtype.
        Raises:
            NonFiniteLogits: a row's largest logit is NaN or infinite.
        """
        best_R = logits_RV.max(dim=1)
        if not bool(torch.isfinite(best_R.values).all()):
            raise NonFiniteLogits
        token_ids: list[int] = best_R.indices.tolist()
        for index, draw in enumerate(draws):
            row = self._rows[draw.row]
            masks_end = draw.position < row.first_end_position and len(row.end_token_ids) > 0
            if masks_end or not row.is_plain_greedy:
                token_ids[index] = _draw(row, logits_RV[index].float(), draw.position, masks_end)
            if row.seen_V is not None:
                row.seen_V[token_ids[index]] = True
            if row.counts_V is not None:
                row.counts_V[token_ids[index]] += 1
        return tuple(
            SampledSequence(draw.row, (token_id,), self._logprobs(logits_RV, index, token_id, draw))
            for index, (draw, token_id) in enumerate(zip(draws, token_ids, strict=True))
        )

    def _logprobs(
        self, logits_RV: torch.Tensor, index: int, token_id: int, draw: Draw
    ) -> tuple[TokenLogprobs, ...]:
        num_top = self._rows[draw.row].params.num_logprobs
        if num_top is None:
            return ()
        return token_logprobs(logits_RV[index : index + 1], [token_id], num_top)


def _draw(row: _Row, logits_V: torch.Tensor, position: int, masks_end: bool) -> int:
    """The token that `row` draws at `position`."""
    params = row.params
    scores_V = _penalized(row, logits_V)
    if masks_end:
        scores_V = scores_V.index_fill(0, row.end_token_ids, float("-inf"))
    if params.temperature == 0:
        return int(scores_V.argmax())
    scores_N, token_ids_N = _candidates(scores_V / params.temperature, params)
    noise_N = gumbel(token_ids_N, params.seed, row.sample_index, position)
    return int(token_ids_N[(scores_N + noise_N).argmax()])


def _penalized(row: _Row, logits_V: torch.Tensor) -> torch.Tensor:
    """Biased logits after the penalties; `logits_V` itself is left alone."""
    params, scores_V = row.params, logits_V
    if row.bias is not None:
        scores_V = scores_V.index_add(0, *row.bias)
    if row.seen_V is not None:
        penalty = params.repetition_penalty
        scaled_V = torch.where(scores_V > 0, scores_V / penalty, scores_V * penalty)
        scores_V = torch.where(row.seen_V, scaled_V, scores_V)
    if row.counts_V is not None:
        scores_V = (
            scores_V
            - params.frequency_penalty * row.counts_V
            - params.presence_penalty * (row.counts_V > 0)
        )
    return scores_V


def _candidates(
    scores_V: torch.Tensor, params: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and ids of the tokens that top-k, top-p and min-p leave; ids ascend where all stay.

    Each rule renormalizes over what the one before left.
    """
    vocab_size = len(scores_V)
    if not 0 < params.top_k < vocab_size and params.top_p >= 1:
        kept = slice(None) if params.min_p <= 0 else _likely_enough(scores_V, params.min_p)
        return scores_V[kept], torch.arange(vocab_size)[kept]
    if 0 < params.top_k < vocab_size:
        scores_N, ids_N = scores_V.topk(params.top_k)
        normalizer = scores_N.logsumexp(0)
    else:
        scores_N, ids_N = scores_V.topk(min(_LIKELY, vocab_size))
        normalizer = scores_V.logsumexp(0)
        if float((scores_N - normalizer).exp().sum()) < params.top_p:
            scores_N, ids_N = scores_V.sort(descending=True)
    if params.top_p < 1:
        # A token stays where the mass before it is below top_p; so the first always stays.
        probabilities_N = (scores_N - normalizer).exp()
        before_N = probabilities_N.cumsum(0) - probabilities_N
        count = max(int((before_N < params.top_p).sum()), 1)
        scores_N, ids_N = scores_N[:count], ids_N[:count]
    if params.min_p > 0:
        kept_N = _likely_enough(scores_N, params.min_p)
        scores_N, ids_N = scores_N[kept_N], ids_N[kept_N]
    return scores_N, ids_N


def _likely_enough(scores_N: torch.Tensor, min_p: float) -> torch.Tensor:
    """Where a token is at least `min_p` times as likely as the likeliest."""
    return scores_N >= scores_N.max() + torch.tensor(min_p).log()
