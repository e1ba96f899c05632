"""GGUF's quantized blocks in layouts of ours, value for value.

| type | block | value | layout |
|---|---|---|---|
| Q8_0 | 32 | d q | `int8_group` 32 |
| Q4_0 | 32 | d (q - 8) | `int4_group` 32: zero 0 |
| Q4_1 | 32 | d q + m | `int4_group` 32: zero m + 8 d |
| Q4_K | 8 x 32 | (d s) q - (dmin t) | `int4_group` 32: scale d s, zero 8 d s - dmin t |
| Q6_K | 16 x 16 | (d s) (q - 32) | `int8_group` 16: scale d s |

d, m and dmin are fp16; s and t are small integers, so products are exact in fp32. A zero is exact too
while it is below 1: fp16's finest step is 2^-24. A larger one of terms that differ by orders of
magnitude is the nearest fp32 number. Types without a row are dequantized by the `gguf` library.

Source: ggml-org/ggml, src/ggml-quants.c, dequantize_row_*.

Legend: N rows, B blocks of a row.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from gguf.constants import GGMLQuantizationType as Kind

Roles = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class BlockForm:
    """The layout that holds a block type, and how blocks [N, B, bytes] become its roles."""

    layout: str
    group_size: int
    pack: Callable[[torch.Tensor], Roles]


def _fp16(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """The fp16 number at that byte of each block; fp32 [N, B]."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16).squeeze(-1).float()


def _joined(nibbles: torch.Tensor) -> torch.Tensor:
    """Nibbles [N, ...] in order as `int4_group` packs them, [N, K/2]."""
    flat = nibbles.flatten(1)
    return flat[:, 0::2] | (flat[:, 1::2] << 4)


def _halves(packed: torch.Tensor) -> torch.Tensor:
    """Low nibbles of a run of bytes, then its high nibbles: how every type lies in a block."""
    return torch.cat((packed & 15, packed >> 4), -1)


def _q8_0(blocks: torch.Tensor) -> Roles:
    codes = blocks[..., 2:].contiguous().view(torch.int8).flatten(1)
    return {"weight": codes, "scale": _fp16(blocks, 0)}


def _q4_0(blocks: torch.Tensor) -> Roles:
    scale = _fp16(blocks, 0)
    weight = _joined(_halves(blocks[..., 2:]))
    return {"weight": weight, "scale": scale, "zero": torch.zeros_like(scale)}


def _q4_1(blocks: torch.Tensor) -> Roles:
    scale = _fp16(blocks, 0)
    weight = _joined(_halves(blocks[..., 4:]))
    return {"weight": weight, "scale": scale, "zero": _fp16(blocks, 2) + 8 * scale}


def _q4_k(blocks: torch.Tensor) -> Roles:
    # Twelve bytes hold eight 6-bit s and eight 6-bit t: the last four of each lend their high bits
    # to the top of the first eight bytes.
    first, second, third = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    s = torch.cat((first & 63, (third & 15) | ((first >> 6) << 4)), -1)
    t = torch.cat((second & 63, (third >> 4) | ((second >> 6) << 4)), -1)
    scale = _fp16(blocks, 0)[..., None] * s.float()
    least = _fp16(blocks, 2)[..., None] * t.float()
    # Each 32 bytes hold two groups: one in low nibbles, one in high ones.
    weight = _joined(_halves(blocks[..., 16:].reshape(*blocks.shape[:2], 4, 32)))
    return {
        "weight": weight,
        "scale": scale.flatten(1),
        "zero": (8 * scale - least).flatten(1),
    }


def _q6_k(blocks: torch.Tensor) -> Roles:
    # Each half of a block: 64 bytes of low nibbles, 32 bytes that hold the four upper bit pairs.
    low = _halves(blocks[..., :128].reshape(*blocks.shape[:2], 2, 64))
    pairs = blocks[..., 128:192].reshape(*blocks.shape[:2], 2, 32)
    high = torch.cat([(pairs >> shift) & 3 for shift in (0, 2, 4, 6)], -1)
    codes = (low | (high << 4)).to(torch.int8) - 32
    s = blocks[..., 192:208].contiguous().view(torch.int8).float()
    scale = _fp16(blocks, 208)[..., None] * s
    return {"weight": codes.flatten(1), "scale": scale.flatten(1)}


BLOCK_FORMS: dict[Kind, BlockForm] = {
    Kind.Q8_0: BlockForm("int8_group", 32, _q8_0),
    Kind.Q4_0: BlockForm("int4_group", 32, _q4_0),
    Kind.Q4_1: BlockForm("int4_group", 32, _q4_1),
    Kind.Q4_K: BlockForm("int4_group", 32, _q4_k),
    Kind.Q6_K: BlockForm("int8_group", 16, _q6_k),
}
