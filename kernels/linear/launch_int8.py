"""Int8 weights of many tokens: the kernel that widens them for torch's product."""

from kernels.launch import Grid
from kernels.linear.launch import LinearShape
from kernels.variant import KernelVariant, pointer
from shared.arch import Arch

# Rows of x from which it takes less time to widen the weight once, for the library to multiply, than to widen it for
# every tile of them: reckoned from steps of 256 sequences on one H100 and the bytes of widening, not swept.
MOST_FUSED_INT8_ROWS = 128

_BLOCK = 2048


def dense_int8(shape: LinearShape, arch: Arch) -> KernelVariant:
    """The variant that writes a weight's values."""
    return KernelVariant(
        op="linear",
        kernel="dense_int8",
        arguments=(pointer("weight", "i8"), pointer("scale", "fp32"), pointer("out", shape.dtype)),
        constants=(("K", shape.k), ("BLOCK", _BLOCK), ("PDL", arch.has_pdl)),
        has_pdl=arch.has_pdl,
    )


def dense_int8_grid(shape: LinearShape) -> Grid:
    """Rows, and chunks of one."""
    return shape.n, -(-shape.k // _BLOCK), 1
