"""What a row has seen and generated, counted for its penalties.

    l = l / repetition if l > 0 else l * repetition    for tokens of prompt and output
    l = l - presence - frequency * count               for tokens of the output

Counting goes on where it stopped; a row that went back (a step that was discarded) counts anew.
Source: Keskar et al. 2019, "CTRL", section 4.1 (repetition); OpenAI API (presence, frequency).
"""

import numpy as np
import numpy.typing as npt
import torch

from runtime_service.scheduling.request import SamplingParams

Tokens = npt.NDArray[np.int32]


def has_penalties(params: SamplingParams) -> bool:
    """Claims that counts change a row's scores."""
    return (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )


class TokenCounts:
    """Counts of one row; `tokens` below are the row's from the first on, prompt and output."""

    def __init__(self, vocab_size: int, num_prompt_tokens: int) -> None:
        self._num_prompt_tokens = num_prompt_tokens
        self._is_seen = np.zeros(vocab_size, dtype=np.bool_)
        self._outputs = np.zeros(vocab_size, dtype=np.int32)
        self._num_counted = 0

    def apply(self, logits_V: torch.Tensor, tokens: Tokens, params: SamplingParams) -> None:
        """Changes `logits_V` as the penalties say, having counted all of `tokens`."""
        self._count(tokens)
        seen = torch.from_numpy(np.flatnonzero(self._is_seen))
        scores = logits_V[seen]
        if params.repetition_penalty != 1.0:
            penalty = params.repetition_penalty
            scores = torch.where(scores > 0, scores / penalty, scores * penalty)
        counts = torch.from_numpy(self._outputs)[seen]
        scores -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
        logits_V[seen] = scores

    def _count(self, tokens: Tokens) -> None:
        if len(tokens) < self._num_counted:
            self._is_seen[:], self._outputs[:], self._num_counted = False, 0, 0
        new = tokens[self._num_counted :]
        self._is_seen[new] = True
        num_outputs = min(len(new), max(0, len(tokens) - self._num_prompt_tokens))
        np.add.at(self._outputs, new[len(new) - num_outputs :], 1)
        self._num_counted = len(tokens)
