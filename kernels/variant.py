"""One compiled specialization of a kernel, as plain data.

Launch rules name variants, the AOT compiler turns them into machine code, the launcher finds that code
by the variant's key. This file knows neither Triton nor CUDA: it is what those three agree on.
"""

import hashlib
import json
from dataclasses import dataclass, field
from functools import cache

Constant = bool | int | float | str | None

DIVISIBILITY = 16

# The engine's layers that hold its kernels.
INDEX_TITLE = "kernels/index.json"
CODE_TITLE = "kernels/code.bin"


@dataclass(frozen=True, slots=True)
class Argument:
    """A run-time argument of a kernel.

    Args:
        name: the kernel's parameter.
        type: Triton's name: `*bf16`, `*fp32`, `*u8`, `*i32`, `i32`, `fp32`.
        is_aligned: declared a multiple of 16: the compiler relies on it, the launcher asserts it.
    """

    name: str
    type: str
    is_aligned: bool


@cache
def pointer(name: str, dtype: str) -> Argument:
    """A pointer; all of ours are 16-byte aligned (undeclared, vector loads fall apart)."""
    return Argument(name, f"*{dtype}", True)


def integer(name: str, *, is_aligned: bool = False) -> Argument:
    """A 32-bit integer."""
    return Argument(name, "i32", is_aligned)


@dataclass(frozen=True, slots=True)
class KernelVariant:
    """A kernel with all its constants chosen.

    Args:
        op: the folder, `kernels/<op>/triton.py`.
        kernel: the function in it.
        arguments: what a launch passes, in the function's order.
        constants: the function's other parameters; None takes a pointer out of the kernel.
        num_warps: of 32 threads.
        num_stages: depth of the software pipeline.
        has_pdl: launched with programmatic dependent launch.
        key: the variant's name: equal keys mean equal variants. Made once: every launch asks for it.
    """

    op: str
    kernel: str
    arguments: tuple[Argument, ...]
    constants: tuple[tuple[str, Constant], ...]
    num_warps: int = 4
    num_stages: int = 1
    has_pdl: bool = False
    key: str = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        # One spelling: variants with equal keys are equal.
        object.__setattr__(self, "constants", tuple(sorted(self.constants)))
        object.__setattr__(self, "key", self._key())

    def _key(self) -> str:
        spec = json.dumps(
            [
                [[a.name, a.type, a.is_aligned] for a in self.arguments],
                self.constants,
                self.num_warps,
                self.num_stages,
                self.has_pdl,
            ],
            separators=(",", ":"),
        )
        return f"{self.op}.{self.kernel}.{hashlib.sha256(spec.encode()).hexdigest()[:16]}"


@dataclass(frozen=True, slots=True)
class KernelRecord:
    """What the launcher must know beside the machine code; an entry of `kernels/index.json`.

    Args:
        symbol: the function's name inside the machine code.
        arguments: type of each run-time argument, and whether it is declared a multiple of 16.
        code: (offset, size) of the cubin in the engine's code layer.
        ptx: the same of its PTX; (0, 0) where the arch's engines carry none.
    """

    symbol: str
    arguments: tuple[tuple[str, bool], ...]
    num_warps: int
    shared_bytes: int
    has_pdl: bool
    code: tuple[int, int]
    ptx: tuple[int, int] = (0, 0)
