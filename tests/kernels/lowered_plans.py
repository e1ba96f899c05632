"""What the lowering chooses, as lines that can be compared: kernel, tiles and grid of every launch of every regime.

Constants that are not choices (sizes, formats, layouts of arguments) are left out: what is compared is how the work is
cut.
"""

import hashlib
from collections.abc import Iterator

from kernels.launch import MatMul, Sizes
from kernels.lowering import lower
from kernels.regimes import REGIMES, Regime
from shared.arch import Arch
from shared.ir import Graph

_CHOSEN = (
    "BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLIT_K", "PREFETCH", "STAGES", "VECTOR",
    "BLOCK_Q", "ROWS", "EXTRA", "MIN_PART",
)  # fmt: skip


def lines(graph: Graph, arch: Arch) -> Iterator[str]:
    """A line for each launch, in order."""
    for regime in REGIMES:
        sizes = _sizes(regime)
        for step in lower(graph, arch, regime):
            if isinstance(step, MatMul):
                yield f"{regime} library {step.weight} {step.least_rows}"
                continue
            constants = dict(step.variant.constants)
            chosen = {name: constants[name] for name in _CHOSEN if name in constants}
            warps = step.variant.num_warps, step.variant.num_stages
            yield f"{regime} {step.variant.kernel} {chosen} {warps} {step.grid(sizes)}"


def digest(graph: Graph, arch: Arch) -> str:
    """The first digits of the SHA-256 of all lines."""
    return hashlib.sha256("\n".join(lines(graph, arch)).encode()).hexdigest()[:16]


def _sizes(regime: Regime) -> Sizes:
    tokens = regime.max_tokens or 1000
    sequences = min(regime.max_sequences or 3, tokens)
    return Sizes(tokens, sequences, sequences)
