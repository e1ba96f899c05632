"""Gumbel noise that is a function of (seed, sample index, position, token id), and of nothing else.

A token drawn as argmax(scores + noise) has the probability that softmax(scores) gives it, and is
the same in any batch, after any preemption.

    counter = (token id // 4, position, sample index, 0);  key = (seed's low half, high half)
    word    = Philox4x32-10(counter, key)[token id % 4]
    noise   = -log(-log((word + 0.5) / 2^32))

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3 (Philox);
Gumbel 1954; Maddison et al. 2014, "A* Sampling", section 2 (Gumbel-max).

Legend: R rows, V vocabulary, C candidates.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
# Up to so many tokens of a row, their noise is made one by one; beyond it, the whole row's.
_MOST_CANDIDATES = 4096

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class NoiseKey:
    """What a row's noise depends on, beside the token."""

    seed: int
    sample_index: int
    position: int

    @property
    def words(self) -> tuple[int, int, int, int]:
        """Position, sample index and the seed's halves, low first, in 32 bits each."""
        seed = self.seed
        return self.position & _MASK, self.sample_index & _MASK, seed & _MASK, seed >> 32 & _MASK


# Gives the token [R] of the highest sum of score and noise, for scores [R, V] and a key a row. Scores may be changed;
# -infinity is never drawn.
DrawTokens = Callable[[torch.Tensor, Sequence[NoiseKey]], torch.Tensor]


def draw_tokens(scores_RV: torch.Tensor, keys: Sequence[NoiseKey]) -> torch.Tensor:
    """`DrawTokens` by torch; `kernels/sampling/cpu.py` has one that takes a fiftieth of the time."""
    allowed = [np.flatnonzero(allowed_V) for allowed_V in (scores_RV > -math.inf).numpy()]
    most = max(map(len, allowed))
    if most > _MOST_CANDIDATES:
        return scores_RV.add_(noise_of_all(keys, scores_RV.shape[1])).argmax(-1)
    # Rows that allow fewer repeat one of theirs, which changes no maximum.
    token_ids_RC = torch.from_numpy(np.stack([np.resize(ids, most) for ids in allowed]))
    scores_RC = scores_RV.gather(1, token_ids_RC)
    winners_R1 = scores_RC.add_(noise_of(keys, token_ids_RC)).argmax(-1, keepdim=True)
    return token_ids_RC.gather(1, winners_R1)[:, 0]


def noise_of_all(keys: Sequence[NoiseKey], vocab_size: int) -> torch.Tensor:
    """The noise of every token, fp32 [R, V]."""
    groups = torch.arange(-(-vocab_size // 4))[None]
    # A row's words at a time: they stay in the core's cache.
    rows = [torch.stack(_words(groups, [key]), -1).view(1, -1)[:, :vocab_size] for key in keys]
    return _gumbel(torch.cat(rows))


def noise_of(keys: Sequence[NoiseKey], token_ids_RC: torch.Tensor) -> torch.Tensor:
    """The noise of some tokens of each row, fp32 [R, C]; what `noise_of_all` gives them."""
    words = torch.stack(_words(token_ids_RC >> 2, keys), -1)
    return _gumbel(words.gather(-1, (token_ids_RC & 3)[..., None])[..., 0])


def philox4x32(counter: Words, key: tuple[torch.Tensor, torch.Tensor]) -> Words:
    """Four 32-bit words of each counter, held in int64; the arguments are too, and broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ (c1 ^ k0), low1, high0 ^ (c3 ^ k1), low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _multiply(words: torch.Tensor, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    # The product's 64 bits are right though int64 wraps; the shift drags its sign in, the mask
    # takes it out.
    product = words * factor
    return (product >> 32).bitwise_and_(_MASK), product.bitwise_and_(_MASK)


def _words(groups: torch.Tensor, keys: Sequence[NoiseKey]) -> Words:
    positions, samples, low, high = torch.tensor([key.words for key in keys]).T[..., None]
    counter = (groups, positions, samples, torch.zeros_like(samples))
    return philox4x32(counter, (low, high))


def _gumbel(words: torch.Tensor) -> torch.Tensor:
    # fp64 inside: (word + 0.5) / 2^32 has more bits than fp32.
    uniform = words.double().add_(0.5).mul_(2.0**-32)
    return uniform.log_().neg_().log_().neg_().float()
