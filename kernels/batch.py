"""What a step's ops read beside their operands: positions, slots and block tables.

Legend: T packed tokens, S sequences, B blocks per sequence, R rows whose logits are wanted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kernels.kv_cache import LayerCache


@dataclass(slots=True)
class StepBatch:
    """One step over packed, ragged sequences. All index tensors are int32 on the step's device.

    Args:
        positions_T: absolute position of each token.
        slot_mapping_T: KV slot that each token is written to: block * block_tokens + offset.
        block_tables_SB: block ids; entries past a sequence's last block are undefined.
        seq_lens_S: tokens of each sequence after this step.
        query_start_S1: first packed token of each sequence, then T.
        logit_rows_R: packed tokens whose logits are wanted.
        kv_caches: per layer, as `kernels/kv_cache.py` lays them out.
        memo: per-step scratch of an executor (masks, rope tables); starts empty, never an input.
    """

    positions_T: torch.Tensor
    slot_mapping_T: torch.Tensor
    block_tables_SB: torch.Tensor
    seq_lens_S: torch.Tensor
    query_start_S1: torch.Tensor
    logit_rows_R: torch.Tensor
    kv_caches: Sequence[LayerCache]
    memo: dict[str, Any] = field(default_factory=dict)
