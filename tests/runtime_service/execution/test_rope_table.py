"""Rotations are made when a GPU's memory is all but given away: of a million positions too."""

import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from runtime_service.execution.cuda_executor import rope_table

FREQUENCIES = [0.5**i for i in range(8)]


class _Largest(TorchDispatchMode):
    """Notes the largest tensor of 64 bits that anything made."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype == torch.float64:
            self.num_bytes = max(self.num_bytes, made.nbytes)
        return made


def test_memory_beside_the_table_does_not_grow_with_it() -> None:
    with _Largest() as largest:
        table = rope_table(FREQUENCIES, 1.5, 100_003, "cpu")
    assert 0 < largest.num_bytes < table.nbytes
    for position in (0, 1, 16_383, 16_384, 65_537, 100_002):
        angles = [position * frequency for frequency in FREQUENCIES]
        wanted = [1.5 * math.cos(a) for a in angles] + [1.5 * math.sin(a) for a in angles]
        assert torch.equal(table[position], torch.tensor(wanted, dtype=torch.float64).float())
