"""The packed inputs of a step, at places on the device that never move.

Legend: T packed tokens, S sequences, B blocks per sequence, R rows whose logits are wanted.
"""

from collections.abc import Sequence

import torch

from kernels.batch import StepBatch
from kernels.kv_cache import LayerCache
from kernels.launch import Sizes
from kernels.launcher import KernelLibrary
from kernels.step_inputs.launch import step_inputs_grid, step_inputs_variant
from runtime_service.execution.cuda_executor import DeviceBatch
from runtime_service.execution.device_rows import DeviceRows

_ALIGNMENT = 64  # int32s: 256 bytes


class StepInputs:
    """Inputs of steps up to `max_sizes`, made from a message that was sent.

    Args:
        kv_caches: per layer.
        rope: as `DeviceBatch` has it.
    """

    def __init__(
        self,
        library: KernelLibrary,
        rows: DeviceRows,
        max_sizes: Sizes,
        block_tokens: int,
        kv_caches: Sequence[LayerCache],
        rope: torch.Tensor,
    ) -> None:
        layout = rows.layout
        counts = {
            "token_ids": max_sizes.tokens,
            "positions": max_sizes.tokens,
            "slots": max_sizes.tokens,
            "seq_lens": max_sizes.sequences,
            "query_start": max_sizes.sequences + 1,
            "part_start": max_sizes.sequences + 1,
            "logit_rows": max_sizes.rows,
            "block_tables": max_sizes.sequences * layout.blocks_stride,
        }
        aligned = [-(-count // _ALIGNMENT) * _ALIGNMENT for count in counts.values()]
        memory = torch.zeros(sum(aligned), dtype=torch.int32, device=rope.device)
        parts = torch.split(memory, aligned)
        self._at = {name: part[:n] for (name, n), part in zip(counts.items(), parts, strict=True)}
        self._block_tables = self._at["block_tables"].view(-1, layout.blocks_stride)
        self._kv_caches, self._rope = kv_caches, rope
        self._every_row = torch.arange(max_sizes.rows, dtype=torch.int32, device=rope.device)
        self._kernel = library.kernel(step_inputs_variant(block_tokens))
        self._pointers = [
            t.data_ptr() for t in (rows.message, rows.tokens, rows.blocks, *self._at.values())
        ]
        self._strides = layout.max_sequences, layout.tokens_stride, layout.blocks_stride

    def launch(self, padded: Sizes, wants_all_logits: bool = False) -> DeviceBatch:
        """Makes the inputs of the step that was sent last; what is beyond it is padding.

        Args:
            wants_all_logits: of every token (R = T), not of each sequence's last.
        """
        self._kernel(
            step_inputs_grid(padded),
            *self._pointers, *self._strides, padded.tokens, padded.sequences,
        )  # fmt: skip
        if wants_all_logits:
            self._at["logit_rows"][: padded.rows].copy_(self._every_row[: padded.rows])
        return self._batch(padded)

    def _batch(self, sizes: Sizes) -> DeviceBatch:
        at = self._at
        step = StepBatch(
            positions_T=at["positions"][: sizes.tokens],
            slot_mapping_T=at["slots"][: sizes.tokens],
            block_tables_SB=self._block_tables[: sizes.sequences],
            seq_lens_S=at["seq_lens"][: sizes.sequences],
            query_start_S1=at["query_start"][: sizes.sequences + 1],
            logit_rows_R=at["logit_rows"][: sizes.rows],
            kv_caches=self._kv_caches,
        )
        part_start_S1 = at["part_start"][: sizes.sequences + 1]
        return DeviceBatch(at["token_ids"][: sizes.tokens], step, part_start_S1, self._rope)
