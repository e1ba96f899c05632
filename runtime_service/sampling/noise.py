"""Gumbel noise that depends on nothing but (seed, sample index, position, token id).

The same token at the same place gets the same noise in any batch, after any preemption, on any
device: a counter-based generator has no state to carry. Adding the noise to scaled logits and
taking the largest draws from their softmax.
Source: Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3" (Philox4x32-10); Gumbel
1954; Maddison et al. 2014, "A* Sampling".
"""

import torch

_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF
_ROUNDS = 10


def philox(
    counter: tuple[torch.Tensor, int, int, int], key: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four words of 32 bits for each value of the counter's first word.

    Args:
        counter: four words; the first is int64 [N] holding values below 2^32.
        key: two words.
    """
    c0 = counter[0]
    c1, c2, c3 = (torch.full_like(c0, word) for word in counter[1:])
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap; the shift is arithmetic, so the high word is masked.
        p0, p1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _WORD) ^ c1 ^ k0,
            p1 & _WORD,
            ((p0 >> 32) & _WORD) ^ c3 ^ k1,
            p0 & _WORD,
        )
        k0, k1 = (k0 + _WEYL_0) & _WORD, (k1 + _WEYL_1) & _WORD
    return c0, c1, c2, c3


def gumbel(token_ids_N: torch.Tensor, seed: int, sample_index: int, position: int) -> torch.Tensor:
    """Standard Gumbel noise of each token at one place.

    Args:
        token_ids_N: int64.
        seed: 64 bits. position: absolute, of the token that is drawn.
    Returns:
        fp32 [N], between -3.2 and 22.9.
    """
    # Four neighbours share a counter: a whole vocabulary costs a quarter of the rounds.
    blocks, place = torch.unique_consecutive(token_ids_N >> 2, return_inverse=True)
    words = philox((blocks, position, sample_index, 0), (seed & _WORD, seed >> 32 & _WORD))
    bits_N = torch.stack(words, dim=1)[place, token_ids_N & 3]
    # In fp64 neither end of (0, 1) rounds to 0 or 1.
    uniform_N = (bits_N.double() + 0.5) * 2.0**-32
    return (-torch.log(-torch.log(uniform_N))).float()
