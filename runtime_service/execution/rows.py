"""The state of every row: its tokens, its block table, how it is sampled; updated by small diffs.

A step is packed from it by row numbers, positions and counts alone. Positions come from the
scheduler's record, never from a counter here: running a step again, or dropping one, leaves no
trace but tokens past a row's end, which the next step overwrites.
"""

from collections.abc import Sequence

import numpy as np
import torch

from kernels.batch import StepBatch
from runtime_service.limits import RuntimeLimits
from runtime_service.sampling.sampler import RowSampler
from runtime_service.sampling.token_counts import Tokens
from runtime_service.scheduling.output import NewSequence, ScheduledSequence, SchedulerOutput


class RowTable:
    """Rows 0 to max_sequences - 1."""

    def __init__(self, limits: RuntimeLimits, vocab_size: int) -> None:
        self._block_tokens = limits.block_tokens
        self._vocab_size = vocab_size
        max_blocks = -(-limits.max_sequence_tokens // limits.block_tokens)
        # The token drawn last is kept too, though it is never computed.
        shape = (limits.max_sequences, limits.max_sequence_tokens + 1)
        self._tokens = np.zeros(shape, dtype=np.int32)
        self._blocks = np.zeros((limits.max_sequences, max_blocks), dtype=np.int32)
        self._num_blocks = [0] * limits.max_sequences
        self._samplers: list[RowSampler | None] = [None] * limits.max_sequences

    def apply(self, step: SchedulerOutput) -> None:
        """Frees rows, enters new sequences and extends block tables."""
        for row in step.freed_rows:
            self._samplers[row] = None
        for new in step.new_sequences:
            self._enter(new)
        for scheduled in step.scheduled:
            if scheduled.new_block_ids:
                self._extend(scheduled.row, scheduled.new_block_ids)

    def pack(
        self, scheduled: Sequence[ScheduledSequence], logit_rows: Sequence[int]
    ) -> tuple[torch.Tensor, StepBatch]:
        """The step's tokens [T] and its batch, which lacks only `kv_caches`."""
        rows = np.array([s.row for s in scheduled])
        starts = np.array([s.start for s in scheduled])
        counts = np.array([s.num_tokens for s in scheduled])
        query_start = np.zeros(len(rows) + 1, dtype=np.int32)
        np.cumsum(counts, out=query_start[1:])
        positions = np.arange(query_start[-1]) + np.repeat(starts - query_start[:-1], counts)
        row_of_token = np.repeat(rows, counts)
        block, offset = np.divmod(positions, self._block_tokens)
        slots = self._blocks[row_of_token, block] * self._block_tokens + offset
        lengths = starts + counts
        max_blocks = -(-int(lengths.max()) // self._block_tokens)
        batch = StepBatch(
            positions_T=_int32(positions),
            slot_mapping_T=_int32(slots),
            block_tables_SB=_int32(self._blocks[rows, :max_blocks]),
            seq_lens_S=_int32(lengths),
            query_start_S1=_int32(query_start),
            logit_rows_R=torch.tensor(logit_rows, dtype=torch.int32),
            kv_caches=(),
        )
        return _int32(self._tokens[row_of_token, positions]), batch

    def read_tokens(self, row: int, count: int) -> Tokens:
        """The row's first `count` tokens; a view."""
        return self._tokens[row, :count]

    def keep(self, row: int, position: int, token_id: int) -> None:
        """Keeps a drawn token."""
        self._tokens[row, position] = token_id

    def sampler(self, row: int) -> RowSampler:
        """How the row draws."""
        sampler = self._samplers[row]
        assert sampler is not None, f"row {row} is free"
        return sampler

    def _enter(self, new: NewSequence) -> None:
        self._tokens[new.row, : len(new.token_ids)] = new.token_ids
        self._num_blocks[new.row] = 0
        self._extend(new.row, new.block_ids)
        self._samplers[new.row] = RowSampler(
            new.sampling, new.stop, new.sample_index, new.num_prompt_tokens, self._vocab_size
        )

    def _extend(self, row: int, block_ids: Sequence[int]) -> None:
        first = self._num_blocks[row]
        self._num_blocks[row] = first + len(block_ids)
        self._blocks[row, first : self._num_blocks[row]] = block_ids


def _int32(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int32))
