"""What the host sends for one step, and the tables on the device that it changes: places in 32-bit words.

    message   header [16] | entries [6, S] | writes [3, W] | words that the writes copy
    header    sequences of the step, tokens of the step, further parts of its attention; the rest is 0
    entry     row, start, num_tokens, first packed token, is_drawn, first further part (kernels/attention/shares.py)
    write     first word in the tables, first word in the message, number of words
    tables    tokens [S, tokens_stride] | blocks [S, blocks_stride] | sampling [S, 16] | edits [S, EDIT_WORDS]
    sampling  0 temperature, 1 top_p and 2 log(min_p) as fp32 bits; 3 top_k, 0 = all; 4, 5 the seed's halves; 6 sample
              index; 7 mode; 8 repetition, 9 presence and 10 frequency penalty as fp32 bits; 11 prompt tokens;
              12 end tokens are masked before this position; 13 end tokens; 14 biases; 15 likeliest tokens that are
              reported, and 1: 0 reports nothing
    edits     end tokens [256] | tokens with a bias [1024] | their biases as fp32 bits [1024]

S is the most sequences that the runtime takes at once. Both sides of the border read this file.
"""

from dataclasses import dataclass

HEADER_WORDS = 16
ENTRY_FIELDS = 6
WRITE_FIELDS = 3
SAMPLING_WORDS = 16
MAX_ENDS = 256
MAX_BIASES = 1024
EDIT_WORDS = MAX_ENDS + 2 * MAX_BIASES

# Modes of a row.
GREEDY, RANDOM, TRUNCATED = range(3)

_ALIGNMENT_WORDS = 64


@dataclass(frozen=True, slots=True)
class TableLayout:
    """Places of the four tables in one tensor of words.

    Args:
        max_sequences: rows.
        tokens_stride: tokens of a row, the one drawn last included.
        blocks_stride: blocks of a row.
    """

    max_sequences: int
    tokens_stride: int
    blocks_stride: int

    @property
    def blocks_at(self) -> int:
        """The first word of the block tables."""
        return _aligned(self.max_sequences * self.tokens_stride)

    @property
    def sampling_at(self) -> int:
        """The first word of the sampling parameters."""
        return self.blocks_at + _aligned(self.max_sequences * self.blocks_stride)

    @property
    def edits_at(self) -> int:
        """The first word of the tokens whose logits are changed."""
        return self.sampling_at + _aligned(self.max_sequences * SAMPLING_WORDS)

    @property
    def num_words(self) -> int:
        """Of all tables."""
        return self.edits_at + self.max_sequences * EDIT_WORDS


@dataclass(frozen=True, slots=True)
class MessageLayout:
    """Places in a step's message.

    Args:
        max_sequences: entries.
        max_writes: writes that fit.
        max_words: words that fit behind them.
    """

    max_sequences: int
    max_writes: int
    max_words: int

    @property
    def writes_at(self) -> int:
        """The first word of the writes; what lies before is sent with every step."""
        return HEADER_WORDS + ENTRY_FIELDS * self.max_sequences

    @property
    def words_at(self) -> int:
        """The first word that writes copy."""
        return self.writes_at + WRITE_FIELDS * self.max_writes

    @property
    def num_words(self) -> int:
        """Of a message as long as it can be."""
        return self.words_at + self.max_words


def _aligned(words: int) -> int:
    return -(-words // _ALIGNMENT_WORDS) * _ALIGNMENT_WORDS
