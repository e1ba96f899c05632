"""The GPU path on a CPU: kernels run through Triton's interpreter, a captured graph is its launches run again.

Import it before anything imports Triton: the interpreter's switch is read then.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.kernels import interpreted  # first: it sets Triton's switch

# isort: split
import torch

from kernels.launch import Grid
from kernels.tuning import BUILT_IN, TuningTable
from kernels.variant import KernelVariant
from runtime_service.execution.cuda_engine import CudaEngine, assemble
from runtime_service.execution.options import RunnerOptions
from shared.ir import Graph

_DTYPES = {
    "i32": torch.int32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16,
    "u64": torch.uint64, "u8": torch.uint8, "u16": torch.uint16,
}  # fmt: skip


class InterpretedLibrary:
    """A kernel library without machine code."""

    arch = interpreted.INTERPRETER

    def __init__(self) -> None:
        self.num_launches: dict[str, int] = {}

    def kernel(self, variant: KernelVariant) -> Callable[..., None]:
        """Launches the kernel on addresses, as machine code is launched."""

        def launch(grid: Grid, *arguments: int) -> None:
            assert len(arguments) == len(variant.arguments), variant.kernel
            operands: dict[str, torch.Tensor | int] = {}
            for argument, value in zip(variant.arguments, arguments, strict=True):
                is_pointer = argument.type.startswith("*")
                assert not argument.is_aligned or value % 16 == 0, argument.name
                operands[argument.name] = _at(value, argument.type[1:]) if is_pointer else value
            self.num_launches[variant.kernel] = self.num_launches.get(variant.kernel, 0) + 1
            interpreted.run(variant, grid, operands)

        return launch


def _at(address: int, dtype: str) -> torch.Tensor:
    """One element there; the interpreter reads on from its address."""
    memory = (ctypes.c_char * 8).from_address(address)
    return torch.frombuffer(memory, dtype=_DTYPES[dtype], count=1)


@dataclass
class CpuMark:
    """A mark whose work is done."""

    num_waits: int = 0

    def synchronize(self) -> None:
        """Waits for nothing, and counts."""
        self.num_waits += 1


@dataclass
class CpuStream:
    """A device without streams: what is launched is done."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    marks: list[CpuMark] = field(default_factory=list)

    def host_words(self, count: int) -> torch.Tensor:
        """Plain memory."""
        return torch.zeros(count, dtype=torch.int32)

    def mark(self) -> CpuMark:
        """A mark, remembered."""
        self.marks.append(CpuMark())
        return self.marks[-1]

    def capture(self, launch: Callable[[], None]) -> Callable[[], None]:
        """Runs it once; a replay runs it again."""
        launch()
        return launch


def interpreted_engine(
    graph: Graph,
    weights: dict[str, dict[str, torch.Tensor]],
    options: RunnerOptions,
    free_bytes: int = 1 << 30,
    table: TuningTable = BUILT_IN,
) -> CudaEngine:
    """The whole GPU path over `graph`, which computes in its own dtype."""
    library: Any = InterpretedLibrary()
    return assemble(graph, library, weights, options, CpuStream(), lambda: free_bytes, table)
