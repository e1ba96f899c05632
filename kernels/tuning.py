"""Where a step can run in several ways, and tables that say which: what `lowering.py` asks before it cuts the work.

A *site* is an op at a number of tokens and a shape of weights; its *candidates* have names, and the first is the
built-in choice (`kernels/<op>/candidates.py`). A *tuning table* names another candidate for some sites. What a table
does not name stays as it is built in, so that the empty table changes nothing. No torch, no Triton.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeVar

Way = TypeVar("Way")

# The two ways of all linears of a step of few tokens: our kernels, on which norms, residual adds, RoPE and silu ride;
# or torch's matrix products, with row kernels between them.
FUSED, LIBRARY = "fused", "cublaslt"


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """Where a choice is made.

    Args:
        op: "linear"; "attention"; "linears": all of a step together, FUSED or LIBRARY.
        tokens: the bucket, as `Regime.max_tokens`: 1; up to 16, 32 or 64; 0: more.
        sequences: of attention that decodes, as `Regime.max_sequences`; else 0.
        n, k: rows and columns of the weight; of attention the widths of a token's queries and keys.
        dtype: what is multiplied, in Triton's names; of attention what the KV cache holds.
        layout: of the weight, with its group size; of attention the head's width.
        rides: what the linear's kernel does besides: "norm+rope"; of attention its window.
    """

    op: str
    tokens: int
    sequences: int = 0
    n: int = 0
    k: int = 0
    dtype: str = ""
    layout: str = ""
    rides: str = ""

    def __str__(self) -> str:
        bucket = f"S<={self.sequences}" if self.sequences else f"M<={self.tokens}"
        if not self.tokens and not self.sequences:
            bucket = "M any"
        size = f"{self.n}x{self.k}" if self.n else ""
        return " ".join(filter(None, (self.op, bucket, size, self.dtype, self.layout, self.rides)))


TuningTable = Mapping[Site, str]
BUILT_IN: TuningTable = MappingProxyType({})


@dataclass(slots=True)
class Choices:
    """What one lowering asked of a table.

    Args:
        seen: the sites that it passed, and the names of their candidates, the built-in choice first.
    """

    table: TuningTable = field(default_factory=lambda: BUILT_IN)
    seen: dict[Site, tuple[str, ...]] = field(default_factory=dict)

    def of(self, site: Site, candidates: Mapping[str, Way]) -> Way:
        """The candidate that the table names, or the first one."""
        names = tuple(candidates)
        self.seen.setdefault(site, names)
        return candidates.get(self.table.get(site, names[0]), candidates[names[0]])
