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

# Bits of the values that boxes are of, by Triton's pointer type.
BOXED_BITS = {"*i16": 16, "*i32": 32, "*bf16": 16}
# Bytes of the parameters that Triton makes of `Boxes`: a tensor map, the matrix's shape, its strides.
BOXES_PARAMETERS = (128, 4, 4, 8, 8)

# The engine's layers that hold its kernels.
INDEX_TITLE = "kernels/index.json"
CODE_TITLE = "kernels/code.bin"


@dataclass(frozen=True, slots=True)
class Boxes:
    """A row-major matrix whose boxes the device's copy engine brings to shared memory (TMA); rows beyond its last one
    and columns beyond its last one are read as 0.

    Args:
        rows: how many; or the name of the kernel's integer argument that says it.
        columns: how many. A row has a multiple of 16 bytes.
        box: (rows, columns) of a copy; a row of it has at most 128 bytes.
        swizzle: bytes over which a box's rows are swizzled in shared memory: 0, 32, 64 or 128.
    """

    rows: int | str
    columns: int
    box: tuple[int, int]
    swizzle: int


@dataclass(frozen=True, slots=True)
class Argument:
    """A run-time argument of a kernel.

    Args:
        name: the kernel's parameter.
        type: Triton's name: `*bf16`, `*fp32`, `*u8`, `*i32`, `i32`, `fp32`.
        is_aligned: declared a multiple of 16: the compiler relies on it, the launcher asserts it.
        boxes: a launch passes a pointer as ever, and the kernel gets a descriptor of these.
    """

    name: str
    type: str
    is_aligned: bool
    boxes: Boxes | None = None


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
                [[a.name, a.type, a.is_aligned, *_spelled(a.boxes)] for a in self.arguments],
                self.constants,
                self.num_warps,
                self.num_stages,
                self.has_pdl,
            ],
            separators=(",", ":"),
        )
        return f"{self.op}.{self.kernel}.{hashlib.sha256(spec.encode()).hexdigest()[:16]}"


def _spelled(boxes: Boxes | None) -> list[object]:
    return [] if boxes is None else [boxes.rows, boxes.columns, *boxes.box, boxes.swizzle]


@dataclass(frozen=True, slots=True)
class KernelRecord:
    """What the launcher must know beside the machine code; an entry of `kernels/index.json`.

    Args:
        symbol: the function's name inside the machine code.
        arguments: what a launch passes.
        code: (offset, size) of the cubin in the engine's code layer.
        ptx: the same of its PTX; (0, 0) where the arch's engines carry none.
    """

    symbol: str
    arguments: tuple[Argument, ...]
    num_warps: int
    shared_bytes: int
    has_pdl: bool
    code: tuple[int, int]
    ptx: tuple[int, int] = (0, 0)
