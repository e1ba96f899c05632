"""Ranges of steps: what launches serve a step depends on how many tokens and sequences it has."""

from dataclasses import dataclass

MOST_SEQUENCES = 512  # of a decode step
# Tokens of a KV block on a GPU: a constant of the compiled kernels.
BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Regime:
    """A range of steps that share their launches.

    Args:
        max_tokens: 1: one token; up to 64: few tokens in tiles of that many; 0: any number.
        max_sequences: decode only, at most so many: chooses attention's tiles; 0 where sequences may have several query
            tokens.
        block_tokens: tokens of one KV block.
    """

    max_tokens: int
    max_sequences: int
    block_tokens: int = BLOCK_TOKENS


DECODE_REGIMES = tuple(
    Regime(tokens, sequences)
    for tokens, sequences in (
        (1, 1),
        (16, 2),
        (16, 4),
        (16, 8),
        (16, 16),
        (32, 32),
        (64, 64),
        (0, MOST_SEQUENCES),
    )
)
REGIMES = (*DECODE_REGIMES, Regime(16, 0), Regime(64, 0), Regime(0, 0))
# Of a step whose linears work in tiles of that many.
MOST_FEW_TOKENS = max(regime.max_tokens for regime in REGIMES)
