"""Tuning tables that come with the code, by the GPU's name as its driver gives it: what a runtime goes by until its
engine was measured on its own GPU.

Only what was measured on that GPU stands here, each row with where it is told. Where the built-in rules of
`kernels/<op>/launch.py` chose what was measured best, there is no row: the rules are the table, and most of them were
made from this GPU. A row whose kernel an engine lacks is passed over.
"""

from dataclasses import dataclass

from kernels.tuning import Site


@dataclass(frozen=True, slots=True)
class ShippedRow:
    """A choice that was measured to be faster than the built-in one.

    Args:
        measured: what was measured, before and after, and where that is told.
    """

    site: Site
    choice: str
    measured: str


SHIPPED: dict[str, tuple[ShippedRow, ...]] = {
    "NVIDIA H100 80GB HBM3": (
        ShippedRow(
            # gate and up of Llama-3.1-8B, one token.
            Site(
                "linear", 1, n=28672, k=4096, dtype="bf16", layout="fp8_channel",
                rides="norm+silu_mul",
            ),
            "m1 n1 k1024 w1 p2 s1 x1 v8",
            "1.744 to 1.705 ms, 16 layers of 8B fp8 at batch 1, whole steps (docs/BENCHMARKS.md, What was tried)",
        ),
    ),
}  # fmt: skip
