"""The state of every row, on the device: its tokens, its block table, how it is sampled.

The host keeps no copy. It sends one message a step: what changed in the tables, and row, start and number of tokens
of each sequence. Positions come from the scheduler's record, never from a counter: running a step again, or dropping
one, leaves no trace but tokens past a row's end, which the next step overwrites.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kernels.attention.shares import Shares
from kernels.launcher import KernelLibrary
from kernels.step_inputs.launch import write_tables_variant
from kernels.step_inputs.layout import (
    EDIT_WORDS,
    ENTRY_FIELDS,
    HEADER_WORDS,
    SAMPLING_WORDS,
    WRITE_FIELDS,
    MessageLayout,
    TableLayout,
)
from runtime_service.execution.device_stream import DeviceStream, Mark
from runtime_service.execution.row_parameters import (
    REPORTS,
    edit_words,
    needs_of,
    sampling_words,
)
from runtime_service.execution.word_copy import WordCopy
from runtime_service.limits import RuntimeLimits
from runtime_service.sampling.sampler import RowSampler
from runtime_service.sampling.token_counts import Tokens
from runtime_service.scheduling.output import NewSequence, ScheduledSequence, SchedulerOutput

# A step that waits to be read, one under way, and one being written.
_NUM_MESSAGES = 3
_MESSAGE_WORDS = 1 << 16
_WORD_BYTES = 4
_TABLE_WORDS = (1 << 31) - 1
# Each of three tables begins at a multiple of 64 words.
_PADDING_WORDS = 3 * 63


@dataclass(frozen=True, slots=True)
class SentStep:
    """A step whose message is on its way.

    Args:
        num_tokens, num_sequences: T and S.
        is_decode: every sequence has one token.
        ends: tokens of each sequence after the step.
        needs: what any sequence's draw needs, as bits (`row_parameters.py`).
        reporting: places of the sequences that report log probabilities.
    """

    num_tokens: int
    num_sequences: int
    is_decode: bool
    ends: npt.NDArray[np.int32]
    needs: int
    reporting: Sequence[int]


class DeviceRows:
    """Rows 0 to max_sequences - 1.

    Args:
        shares: how the engine's kernels share out the keys of a step.
    """

    def __init__(
        self,
        library: KernelLibrary,
        limits: RuntimeLimits,
        vocab_size: int,
        shares: Shares,
        stream: DeviceStream,
    ) -> None:
        rows = limits.max_sequences
        max_blocks = -(-limits.max_sequence_tokens // limits.block_tokens)
        # The token drawn last is kept too, though it is never computed.
        self.layout = TableLayout(rows, limits.max_sequence_tokens + 1, max_blocks)
        assert self.layout.num_words <= _TABLE_WORDS, "writes cannot name every place in the tables"
        self._messages = MessageLayout(rows, 4 * rows, _MESSAGE_WORDS)
        self._stream = stream
        self._shares = shares
        self._vocab_size = vocab_size
        self._tables = _words(self.layout.num_words, stream)
        self.message = _words(self._messages.num_words, stream)
        self._copy = WordCopy(library)
        self._write_tables = library.kernel(write_tables_variant())
        self._images = [
            _Image(stream.host_words(self._messages.num_words), self._messages)
            for _ in range(_NUM_MESSAGES)
        ]
        self._next = 0
        self._filling: _Image | None = None
        self._num_blocks = [0] * rows
        self._needs = np.zeros(rows, dtype=np.uint8)
        self._sequences: list[NewSequence | None] = [None] * rows
        self._samplers: dict[int, RowSampler] = {}

    @staticmethod
    def position_bytes(max_sequences: int, block_tokens: int) -> int:
        """What each token of the longest sequence takes in the tables, and in the step's copy of the block tables."""
        return max_sequences * (_WORD_BYTES - (-2 * _WORD_BYTES // block_tokens))

    @staticmethod
    def most_positions(max_sequences: int, block_tokens: int) -> int:
        """Tokens of the longest sequence for which writes can name every place in the tables, by 31 bits."""
        words_of_row = (_TABLE_WORDS - _PADDING_WORDS) // max_sequences
        # L + 1 tokens and ceil(L / block_tokens) blocks, which are at most L / block_tokens + 1.
        words = words_of_row - SAMPLING_WORDS - EDIT_WORDS - 2
        return max(words, 0) * block_tokens // (block_tokens + 1)

    @property
    def tokens(self) -> torch.Tensor:
        """The token table, [S, tokens_stride]."""
        size = self.layout.max_sequences * self.layout.tokens_stride
        return self._tables[:size].view(-1, self.layout.tokens_stride)

    @property
    def blocks(self) -> torch.Tensor:
        """The block tables, words from their first on."""
        return self._tables[self.layout.blocks_at :]

    @property
    def sampling(self) -> torch.Tensor:
        """The sampling parameters, words from their first on."""
        return self._tables[self.layout.sampling_at :]

    @property
    def edits(self) -> torch.Tensor:
        """The tokens whose logits are changed, words from their first on."""
        return self._tables[self.layout.edits_at :]

    def apply(self, step: SchedulerOutput) -> None:
        """Frees rows, enters new sequences and extends block tables: in the next message."""
        for row in step.freed_rows:
            self._sequences[row] = None
            self._samplers.pop(row, None)
        for new in step.new_sequences:
            self._enter(new)
        for scheduled in step.scheduled:
            if scheduled.new_block_ids:
                self._extend(scheduled.row, scheduled.new_block_ids)

    def send(self, scheduled: Sequence[ScheduledSequence], draws: bool = True) -> SentStep:
        """Sends the message, and changes the tables, without waiting.

        Args:
            draws: what is sampled in this step is drawn on the device.
        """
        image, count = self._image(), len(scheduled)
        entries = image.entries[:, :count]
        entries[0] = rows = np.array([s.row for s in scheduled], dtype=np.int32)
        entries[1] = starts = np.array([s.start for s in scheduled], dtype=np.int32)
        entries[2] = counts = np.array([s.num_tokens for s in scheduled], dtype=np.int32)
        packed_ends = counts.cumsum()
        entries[3] = packed_ends - counts
        entries[4] = is_drawn = np.array(
            [draws and s.is_sampled for s in scheduled], dtype=np.bool_
        )
        needs_S = self._needs[rows] * is_drawn
        needs = int(np.bitwise_or.reduce(needs_S))
        reporting = np.flatnonzero(needs_S & REPORTS).tolist() if needs & REPORTS else ()
        ends = starts + counts
        further_parts = self._shares.further_parts(counts, ends)
        part_ends = further_parts.cumsum()
        entries[5] = part_ends - further_parts
        num_tokens = int(packed_ends[-1]) if count else 0
        image.words[:3] = count, num_tokens, part_ends[-1] if count else 0
        self._send(image)
        return SentStep(num_tokens, count, num_tokens == count, ends, needs, reporting)

    def send_nothing(self) -> None:
        """A message of no sequence: all of a step is padding then."""
        self.send(())

    def read_tokens(self, row: int, count: int) -> Tokens:
        """The row's first `count` tokens, those drawn by launched steps included; waits for them."""
        tokens: Tokens = self.tokens[row, :count].cpu().numpy()
        return tokens

    def keep(self, row: int, position: int, token_id: int) -> None:
        """Keeps a token that the host drew."""
        self.tokens[row, position].fill_(token_id)

    def sampler(self, row: int) -> RowSampler:
        """How the row draws, for the host's sampler."""
        new = self._sequences[row]
        assert new is not None, f"row {row} is free"
        if row not in self._samplers:
            self._samplers[row] = RowSampler(
                new.sampling, new.stop, new.sample_index, new.num_prompt_tokens, self._vocab_size
            )
        return self._samplers[row]

    def num_top(self, row: int) -> int:
        """How many of the likeliest tokens the row reports beside each that it draws."""
        new = self._sequences[row]
        assert new is not None, f"row {row} is free"
        return new.sampling.num_logprobs or 0

    def scores_prompt(self, scheduled: ScheduledSequence) -> bool:
        """Claims that log probabilities of prompt tokens are wanted from this step."""
        new = self._sequences[scheduled.row]
        assert new is not None, f"row {scheduled.row} is free"
        return new.sampling.prompt_logprobs and scheduled.start < new.num_prompt_tokens - 1

    # Writing.

    def _enter(self, new: NewSequence) -> None:
        row = new.row
        self._sequences[row] = new
        self._samplers.pop(row, None)
        self._needs[row] = needs_of(new)
        self._write(row * self.layout.tokens_stride, np.array(new.token_ids, dtype=np.int32))
        words = sampling_words(new, self._vocab_size)
        self._write(self.layout.sampling_at + row * SAMPLING_WORDS, words)
        self._write(self.layout.edits_at + row * EDIT_WORDS, edit_words(new))
        self._num_blocks[row] = 0
        self._extend(row, new.block_ids)

    def _extend(self, row: int, block_ids: Sequence[int]) -> None:
        first = self._num_blocks[row]
        self._num_blocks[row] = first + len(block_ids)
        assert self._num_blocks[row] <= self.layout.blocks_stride, f"row {row} has too many blocks"
        at = self.layout.blocks_at + row * self.layout.blocks_stride + first
        self._write(at, np.array(block_ids, dtype=np.int32))

    def _write(self, at: int, words: npt.NDArray[np.int32]) -> None:
        while len(words):
            image = self._image()
            written = image.write(at, words)
            at, words = at + written, words[written:]
            if len(words):  # it is full: this part of the step goes ahead
                image.words[:3] = 0
                self._send(image)

    def _image(self) -> "_Image":
        if self._filling is None:
            self._filling = self._images[self._next]
            self._next = (self._next + 1) % _NUM_MESSAGES
            self._filling.clear()
        return self._filling

    def _send(self, image: "_Image") -> None:
        self._copy(image.buffer, self.message, image.num_used)
        if image.num_writes:
            grid = (image.num_writes, 1, 1)
            arguments = self.message.data_ptr(), self._tables.data_ptr(), self._messages.writes_at
            self._write_tables(grid, *arguments)
        image.mark = self._stream.mark()
        self._filling = None


def _words(count: int, stream: DeviceStream) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32, device=stream.device)


class _Image:
    """A message on the host, reused when the device has taken it."""

    def __init__(self, buffer: torch.Tensor, layout: MessageLayout) -> None:
        self.buffer = buffer
        self.words: npt.NDArray[np.int32] = buffer.numpy()
        self._layout = layout
        self.entries = self.words[HEADER_WORDS : layout.writes_at].reshape(ENTRY_FIELDS, -1)
        self._writes = self.words[layout.writes_at : layout.words_at].reshape(-1, WRITE_FIELDS)
        self.mark: Mark | None = None
        self.num_writes = self._num_words = 0

    @property
    def num_used(self) -> int:
        """Words that must be sent."""
        return (
            self._layout.words_at + self._num_words if self.num_writes else self._layout.writes_at
        )

    def clear(self) -> None:
        """Starts anew, once the device has taken what was here."""
        if self.mark is not None:
            self.mark.synchronize()
        self.num_writes = self._num_words = 0

    def write(self, at: int, words: npt.NDArray[np.int32]) -> int:
        """Adds as many of the words as fit, to be written at word `at` of the tables; returns their number."""
        room = self._layout.max_words - self._num_words
        count = min(len(words), room) if self.num_writes < self._layout.max_writes else 0
        if count:
            first = self._layout.words_at + self._num_words
            self.words[first : first + count] = words[:count]
            self._writes[self.num_writes] = at, first, count
            self.num_writes += 1
            self._num_words += count
        return count
