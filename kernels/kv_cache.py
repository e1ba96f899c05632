"""How keys and values are kept: as numbers of the graph's dtype, or in 8 bits.

    scale[t, h] = max over d of |x[t, h, d]| / largest;  code = x / scale, rounded to nearest, ties to even

An 8-bit cache has a scale for each token and kv head: it needs no calibration, a token is written once and for all,
and a head with outliers costs no other head its precision. Legend: N blocks, B tokens of a block, K kv heads, D head
dim, T packed tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from shared.ir import Graph

LayerCache = tuple[torch.Tensor, ...]
"""One layer's keys and values, [N, K, B, D] each; where they are codes, then their scales, fp32 [N, K, B] each.

In a block the tokens of a head follow each other: who attends reads a head's keys in one piece.
"""

Allocate = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


@dataclass(frozen=True, slots=True)
class KvFormat:
    """How a cache holds keys and values.

    Args:
        dtype: torch's name.
        largest: the code that a head's largest magnitude becomes; 0: values are kept as they are.
    """

    dtype: str
    largest: float = 0.0

    @property
    def is_scaled(self) -> bool:
        """Claims that the cache holds codes and scales."""
        return self.largest > 0

    def bytes_per_token(self, graph: Graph) -> int:
        """Bytes that one token takes in all layers of `graph`."""
        num_layers, num_heads, head_dim = _sizes(graph)
        head_bytes = head_dim * getattr(torch, self.dtype).itemsize + 4 * self.is_scaled
        return int(2 * num_layers * num_heads * head_bytes)

    def allocate(
        self, graph: Graph, num_blocks: int, block_tokens: int, allocate: Allocate = _zeros
    ) -> tuple[torch.Tensor, ...]:
        """Empty caches: each part of a `LayerCache`, for all layers in one tensor.

        Args:
            allocate: gives zeros of a shape and a dtype.
        """
        num_layers, num_heads, head_dim = _sizes(graph)
        values = (num_layers, num_blocks, num_heads, block_tokens, head_dim)
        parts: list[tuple[tuple[int, ...], torch.dtype]] = [(values, getattr(torch, self.dtype))]
        if self.is_scaled:
            parts.append((values[:-1], torch.float32))
        return tuple(allocate(shape, dtype) for shape, dtype in parts for _ in "kv")


# What a build may ask for by name.
EIGHT_BIT_FORMATS = {"fp8": KvFormat("float8_e4m3fn", 448.0), "int8": KvFormat("int8", 127.0)}


def largest_code(dtype: torch.dtype) -> float:
    """Of a cache whose codes have this dtype."""
    (largest,) = (f.largest for f in EIGHT_BIT_FORMATS.values() if getattr(torch, f.dtype) == dtype)
    return largest


def kv_format(graph: Graph, plain_dtype: str = "") -> KvFormat:
    """The format that `graph` was built for.

    Args:
        plain_dtype: torch's name of what a cache without codes holds; empty: what the graph computes in.
    """
    name = str(graph.config.get("kv_cache", ""))
    if name:
        return EIGHT_BIT_FORMATS[name]
    return KvFormat(plain_dtype or str(graph.config["dtype"]))


def by_layer(parts: Sequence[torch.Tensor]) -> list[LayerCache]:
    """The layers' caches, of what `allocate` gave."""
    return list(zip(*parts, strict=True))


def block_tokens(cache: LayerCache) -> int:
    """Tokens of a block."""
    return cache[0].shape[2]


def write(cache: LayerCache, slots_T: torch.Tensor, *new: torch.Tensor) -> None:
    """Puts keys and values, [T, K*D] each, into their tokens' slots: block * B + offset."""
    size = block_tokens(cache)
    blocks_T, offsets_T = slots_T.long() // size, slots_T.long() % size
    for index, new_TN in enumerate(new):
        stored = cache[index]
        x_TKD = new_TN.reshape(-1, stored.shape[1], stored.shape[3])
        if len(cache) > 2:
            x_TKD, scale_TK = _encoded(x_TKD, stored.dtype)
            cache[2 + index][blocks_T, :, offsets_T] = scale_TK
        stored[blocks_T, :, offsets_T] = x_TKD.to(stored.dtype)


def read(cache: LayerCache, blocks: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `length` keys and values in `blocks`, [length, K, D] each; fp32 where they are codes."""
    blocks = blocks.long()

    def values(index: int) -> torch.Tensor:
        x_NKBD = cache[index][blocks]
        if len(cache) > 2:
            x_NKBD = x_NKBD.float() * cache[2 + index][blocks][..., None]
        return x_NKBD.transpose(1, 2).flatten(0, 1)[:length]

    return values(0), values(1)


def _encoded(x_TKD: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    x_TKD = x_TKD.float()
    largest = largest_code(dtype)
    # NaN and infinity make the scale NaN or infinite, and so are not lost.
    scale_TK = x_TKD.abs().amax(-1) / largest
    codes_TKD = (x_TKD / scale_TK[..., None].clamp(min=1e-30)).clamp(-largest, largest)
    codes_TKD = codes_TKD.nan_to_num(0.0)
    return (codes_TKD if dtype.is_floating_point else codes_TKD.round()), scale_TK


def _sizes(graph: Graph) -> tuple[int, int, int]:
    names = ("num_layers", "num_kv_heads", "head_dim")
    num_layers, num_heads, head_dim = (int(str(graph.config[name])) for name in names)
    return num_layers, num_heads, head_dim
