"""Decode steps of few sequences on a CPU, each number of them recorded when it first comes.

Legend: S sequences, of one token each, B blocks per sequence, V vocabulary.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from kernels.batch import StepBatch
from kernels.cpu_program import Buffers, Program, record
from kernels.kv_cache import LayerCache

# A step of more takes long enough to hide what Python does, and each number's logits stay in memory.
MOST_SEQUENCES = 16

Run = Callable[[torch.Tensor, StepBatch], torch.Tensor]


class RecordedSteps:
    """Runs a step by its program, where there is one.

    Args:
        run: computes a step's output, node by node.
        max_blocks: of a sequence.
    """

    def __init__(self, run: Run, kv_caches: Sequence[LayerCache], max_blocks: int) -> None:
        self._run = run
        self._kv_caches = kv_caches
        self._buffers = Buffers()
        self._programs: dict[int, tuple[Program, torch.Tensor] | None] = {}
        # What programs read; a step's own values are copied here.
        indices = torch.arange(MOST_SEQUENCES + 1, dtype=torch.int32)
        self._token_ids_S, self._positions_S, self._slots_S, self._lens_S = indices.new_zeros(
            4, MOST_SEQUENCES
        )
        # Not by torch: it fills large tensors on threads of the caller's own, and where OpenMP has more threads than
        # there are CPUs, those that run steps sleep between two loops instead of spinning: steps take twice as long.
        self._tables_SB = torch.from_numpy(np.zeros((MOST_SEQUENCES, max_blocks), np.int32))
        self._starts_S1 = indices

    def forward(self, token_ids_T: torch.Tensor, batch: StepBatch) -> torch.Tensor | None:
        """The step's output, until the next call; None where it is of another kind, and nothing was computed."""
        num_sequences = len(batch.seq_lens_S)
        if not (
            len(token_ids_T) == num_sequences <= MOST_SEQUENCES
            and batch.logit_rows_R.tolist() == list(range(num_sequences))
        ):
            return None
        if num_sequences not in self._programs:
            return self._record(token_ids_T, batch)
        recorded = self._programs[num_sequences]
        if recorded is None:
            return None
        program, output = recorded
        self._enter(token_ids_T, batch)
        program.run()
        return output

    def _enter(self, token_ids_S: torch.Tensor, batch: StepBatch) -> None:
        num_sequences, num_blocks = batch.block_tables_SB.shape
        self._token_ids_S[:num_sequences] = token_ids_S
        self._positions_S[:num_sequences] = batch.positions_T
        self._slots_S[:num_sequences] = batch.slot_mapping_T
        self._lens_S[:num_sequences] = batch.seq_lens_S
        self._tables_SB[:num_sequences, :num_blocks] = batch.block_tables_SB

    def _record(self, token_ids_S: torch.Tensor, batch: StepBatch) -> torch.Tensor:
        self._enter(token_ids_S, batch)
        num_sequences = len(token_ids_S)
        kept = StepBatch(
            positions_T=self._positions_S[:num_sequences],
            slot_mapping_T=self._slots_S[:num_sequences],
            block_tables_SB=self._tables_SB[:num_sequences],
            seq_lens_S=self._lens_S[:num_sequences],
            query_start_S1=self._starts_S1[: num_sequences + 1],
            logit_rows_R=self._starts_S1[:num_sequences],
            kv_caches=self._kv_caches,
        )
        output, program = record(
            lambda: self._run(self._token_ids_S[:num_sequences], kept), self._buffers
        )
        self._programs[num_sequences] = None if program is None else (program, output)
        return output
