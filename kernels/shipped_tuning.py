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
            "2.2 % of a step of 8B fp8, twice: 1.744 to 1.705 ms (16 layers; docs/BENCHMARKS.md, What was tried), "
            "3.218 to 3.147 ms (all 32; Candidates and tuning)",
        ),
        ShippedRow(
            # Llama-3.2-1B's qkv, 17 to 32 tokens; then 2 to 16.
            Site(
                "linear", 32, n=3072, k=2048, dtype="fp8e4nv", layout="fp8_channel",
                rides="norm+rope",
            ),
            "m32 n64 k256 w4 p0 s3 x2 v0",
            "4.0 and 2.9 % of a step of 32 sequences, 1B fp8 (docs/BENCHMARKS.md, Candidates and tuning)",
        ),
        ShippedRow(
            Site(
                "linear", 16, n=3072, k=2048, dtype="fp8e4nv", layout="fp8_channel",
                rides="norm+rope",
            ),
            "m16 n64 k256 w4 p0 s4 x2 v0",
            "1.2 % of a step of 16 sequences, twice, 1B fp8 (docs/BENCHMARKS.md, Candidates and tuning)",
        ),
    ),
}  # fmt: skip
