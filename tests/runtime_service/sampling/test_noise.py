"""The noise is Philox's, is Gumbel's, and depends on its key alone."""

import math

import pytest
import torch

from runtime_service.sampling.noise import NoiseKey, noise_of, noise_of_all, philox4x32

# Counter, key, words: the known answers that Random123 ships (kat_vectors, philox4x32 10).
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_the_known_answers(
    counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]
) -> None:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    found = philox4x32((c0, c1, c2, c3), (torch.tensor([key[0]]), torch.tensor([key[1]])))
    assert tuple(int(word) for word in found) == words


def test_noise_of_a_row_is_the_same_bits_in_any_batch() -> None:
    keys = [NoiseKey(2**63 + 5 * i, i % 3, 1000 - i) for i in range(7)]
    together = noise_of_all(keys, 1003)
    for index, key in enumerate(keys):
        assert torch.equal(noise_of_all([key], 1003)[0], together[index])


def test_noise_of_some_tokens_is_what_all_of_them_have() -> None:
    keys = [NoiseKey(7, 0, 3), NoiseKey(2**64 - 1, 1, 4)]
    token_ids = torch.tensor([[0, 1002, 5, 6, 7], [998, 3, 3, 2, 1]])
    expected = noise_of_all(keys, 1003).gather(1, token_ids)
    assert torch.equal(noise_of(keys, token_ids), expected)


@pytest.mark.parametrize(
    "other", [NoiseKey(6, 0, 9), NoiseKey(5 + 2**32, 0, 9), NoiseKey(5, 1, 9), NoiseKey(5, 0, 10)]
)
def test_noise_depends_on_every_part_of_its_key(other: NoiseKey) -> None:
    a, b = noise_of_all([NoiseKey(5, 0, 9), other], 4000)
    assert not bool((a == b).any())
    assert abs(float(torch.corrcoef(torch.stack((a, b)))[0, 1])) < 0.06


def test_noise_is_gumbel_distributed() -> None:
    """Kolmogorov-Smirnov against exp(-exp(-x)); 1.95 / sqrt(n) is exceeded once in a thousand."""
    noise = noise_of_all([NoiseKey(11, 0, i) for i in range(20)], 10_000).flatten().double()
    sorted_noise = noise.sort().values
    expected = torch.exp(-torch.exp(-sorted_noise))
    count = len(noise)
    empirical = (torch.arange(count).double() + 0.5) / count
    assert bool(noise.isfinite().all())
    assert float((expected - empirical).abs().max()) < 1.95 / math.sqrt(count)
