"""Draws and scores of prompt tokens on the host, from logits that are there already.

All that a CPU's steps draw; on a GPU, what steps that score prompts draw. Both keep what rows are by
themselves.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from runtime_service.sampling.noise import DrawTokens, draw_tokens
from runtime_service.sampling.sampler import Draw, RowSampler, sample, token_logprobs
from runtime_service.sampling.token_counts import Tokens
from runtime_service.scheduling.output import SampledSequence, ScheduledSequence, TokenLogprobs


class HostRows(Protocol):
    """Rows whose tokens the host can read and write."""

    def sampler(self, row: int) -> RowSampler:
        """How the row draws."""

    def read_tokens(self, row: int, count: int) -> Tokens:
        """The row's first `count` tokens."""

    def keep(self, row: int, position: int, token_id: int) -> None:
        """Keeps a drawn token."""


def draw(
    rows: HostRows,
    scheduled: Sequence[ScheduledSequence],
    logits_RV: torch.Tensor,
    draw_tokens: DrawTokens = draw_tokens,
) -> list[SampledSequence]:
    """One token for each of `scheduled`, kept in its row.

    Args:
        logits_RV: of the last token of each, in the same order.
    Raises:
        NonFiniteLogits: as `sample`.
    """
    if not scheduled:
        return []
    ends = [s.start + s.num_tokens for s in scheduled]
    draws = [
        Draw(rows.sampler(s.row), rows.read_tokens(s.row, end))
        for s, end in zip(scheduled, ends, strict=True)
    ]
    token_ids, logprobs = sample(logits_RV, draws, draw_tokens)
    drawn = []
    for s, end, token_id, entry in zip(scheduled, ends, token_ids, logprobs, strict=True):
        rows.keep(s.row, end, token_id)
        drawn.append(SampledSequence(s.row, (token_id,), () if entry is None else (entry,)))
    return drawn


def num_scored(rows: HostRows, s: ScheduledSequence) -> int:
    """How many prompt tokens the step scores; its first logits score them.

    The token at position p scores the one at p + 1, as long as that is the prompt's.
    """
    row = rows.sampler(s.row)
    if not row.params.prompt_logprobs:
        return 0
    return max(min(s.num_tokens, row.num_prompt_tokens - 1 - s.start), 0)


def score(rows: HostRows, s: ScheduledSequence, logits_TV: torch.Tensor) -> list[TokenLogprobs]:
    """What the prompt tokens after `s.start` are worth, one for each of `logits_TV`."""
    count = len(logits_TV)
    tokens = rows.read_tokens(s.row, s.start + 1 + count)[s.start + 1 :]
    num_top = rows.sampler(s.row).params.num_logprobs or 0
    return token_logprobs(logits_TV, torch.from_numpy(tokens), [num_top] * count)


def pieces(
    scheduled: Sequence[ScheduledSequence], max_tokens: int
) -> Iterator[list[ScheduledSequence]]:
    """The same work in steps of at most `max_tokens`: logits of all of them are held at once."""
    piece: list[ScheduledSequence] = []
    room = max_tokens
    for s in scheduled:
        start, end = s.start, s.start + s.num_tokens
        while start < end:
            count = min(room, end - start)
            is_sampled = s.is_sampled and start + count == end
            piece.append(ScheduledSequence(s.row, start, count, is_sampled=is_sampled))
            start, room = start + count, room - count
            if not room:
                yield piece
                piece, room = [], max_tokens
    if piece:
        yield piece
