"""Draws among all tokens on a CPU are those that summing every score with its noise gives."""

import math

import numpy as np
import pytest
import torch

from kernels.sampling.cpu import draw_tokens
from kernels.sampling.cpu_kernel import _bound, _noise
from runtime_service.sampling import noise
from runtime_service.sampling.noise import NoiseKey

KEYS = [NoiseKey(2**64 - 1 - 77 * i, i % 3, 2000 + i) for i in range(40)]


@pytest.mark.parametrize("vocab_size", [1, 2, 3, 1003, 1024, 1025, 20011])
@pytest.mark.parametrize("deviation", [0.0, 0.1, 4.0, 100.0])
def test_draws_are_those_of_every_tokens_noise(vocab_size: int, deviation: float) -> None:
    torch.manual_seed(vocab_size)
    scores = deviation * torch.randn(len(KEYS), vocab_size)
    expected = noise.draw_tokens(scores.clone(), KEYS)
    assert torch.equal(draw_tokens(scores, KEYS), expected)


def test_what_may_not_be_drawn_is_not() -> None:
    torch.manual_seed(0)
    scores = torch.randn(len(KEYS), 5000)
    scores[torch.rand(scores.shape) < 0.999] = -math.inf
    scores[:, 4321] = 0.0
    expected = noise.draw_tokens(scores.clone(), KEYS)
    assert torch.equal(draw_tokens(scores, KEYS), expected)
    only = torch.full((len(KEYS), 3000), -math.inf)
    only[:, 2999] = -50.0
    assert draw_tokens(only, KEYS).tolist() == [2999] * len(KEYS)


def test_a_row_is_drawn_alike_in_any_batch() -> None:
    scores = torch.randn(len(KEYS), 3001, generator=torch.Generator().manual_seed(1))
    together = draw_tokens(scores, KEYS)
    for row, key in enumerate(KEYS):
        assert draw_tokens(scores[row : row + 1], [key])[0] == together[row]


def test_no_words_noise_is_beyond_its_bound() -> None:
    """A bound that is too low loses the token that it is of, for no other reason than its word."""
    words = {sign * 2**n + near for n in range(33) for near in range(-3, 4) for sign in (1, -1)}
    random = np.random.default_rng(0).integers(2**32, size=3000)
    for word in {*(word % 2**32 for word in words), *random.tolist()}:
        exact = -math.log(-math.log((word + 0.5) / 2**32))
        assert _noise(np.uint32(word)) == np.float32(exact)
        assert exact <= _bound(np.uint32(word)) <= max(exact, 0) + 0.55
