"""What a step launches: kernels by variant, or a matrix product of torch's, on named operands.

Plain data between the launch rules (`lowering.py`, `kernels/<op>/launch.py`) and the executor that binds
names to device memory.

With PDL a kernel starts while the one before it runs, and that one may have started so too: before its own
`gdc_wait` it may read only what no kernel of the step writes. A step's first kernel, the embedding, lets the next one
start when it has waited itself. So whatever was written before the step's first kernel, by earlier steps or by
`step_inputs`, is seen by all of its kernels before their wait. Of a kernel's programs some, whatever the data, have to
wait, or the kernel after it would not wait for the one before it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from kernels.tuning import Site
from kernels.variant import KernelVariant

Grid = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of one step: packed tokens, sequences, rows whose logits are wanted."""

    tokens: int
    sequences: int
    rows: int


@dataclass(frozen=True, slots=True)
class Value:
    """A value of the graph."""

    name: str


@dataclass(frozen=True, slots=True)
class Temporary:
    """A value that the lowering added: a row for each token at most. dtype is torch's name."""

    name: str
    dtype: str
    width: int


@dataclass(frozen=True, slots=True)
class Weight:
    """A packed tensor: weight name and role of its layout."""

    name: str
    role: str


@dataclass(frozen=True, slots=True)
class Batch:
    """A tensor of the step's batch: a field of `StepBatch`, `token_ids_T`, `part_start_S1`, or `rope`."""

    field: str


@dataclass(frozen=True, slots=True)
class KvCache:
    """A part of a layer's cache: 0 keys, 1 values; where they are codes, 2 and 3 their scales."""

    layer: int
    part: int


@dataclass(frozen=True, slots=True)
class Scratch:
    """Memory that lives from launch to launch and starts as zeros.

    Args:
        name: equal names share memory; the largest request decides.
        num_bytes: for a step of these sizes.
    """

    name: str
    num_bytes: Callable[[Sizes], int]


@dataclass(frozen=True, slots=True)
class Size:
    """An integer of the step: a field of `Sizes`, or `table_stride`."""

    field: str


@dataclass(frozen=True, slots=True)
class Number:
    """A float that is the same in every step."""

    value: float


Operand = Value | Temporary | Weight | Batch | KvCache | Scratch | Size | Number


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch; `operands` in the order of the variant's arguments.

    `site`: where its variant was chosen among others, if there were any.
    """

    variant: KernelVariant
    grid: Callable[[Sizes], Grid]
    operands: tuple[Operand, ...]
    site: Site | None = None


@dataclass(frozen=True, slots=True)
class MatMul:
    """out = x @ weight.T (+ bias) by torch's library, for many tokens.

    Args:
        x_scale: per-token scale of an e4m3 x; then `weight` is fp8_channel.
        dense: where a launch before it left the weight's values, in x's dtype; None: `weight` is they.
        size: the field of `Sizes` that says how many rows x has.
        least_rows: steps of fewer are other launches'.
        adds: is added to the product, and is lost: `out` takes its memory.
    """

    x: Value | Temporary
    weight: str
    bias: str | None
    out: Value
    size: str
    x_scale: Temporary | None = None
    dense: Scratch | None = None
    least_rows: int = 1
    adds: Value | None = None


Step = Launch | MatMul


def between(
    grid: Callable[[Sizes], Grid], field: str, least: int, most: int | None = None
) -> Callable[[Sizes], Grid]:
    """`grid` in steps of `least` to `most` rows; in others nothing."""

    def within(sizes: Sizes) -> Grid:
        rows = int(getattr(sizes, field))
        return grid(sizes) if rows >= least and (most is None or rows <= most) else (0, 0, 0)

    return within


def power_of_two(number: int) -> int:
    """The least power of two that is at least `number`: Triton's ranges have no other lengths."""
    return 1 << (number - 1).bit_length()
