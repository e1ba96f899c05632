"""How a weight matrix is stored, and what its stored values stand for.

| layout | roles | value |
|---|---|---|
| `plain` | weight [N, K] | weight |
| `int8_channel` | weight int8 [N, K], scale fp32 [N] | weight * scale |
| `int8_group` | weight int8 [N, K], scale fp32 [N, J] | weight * scale |
| `int4_group` | weight uint8 [N, K/2], scale and zero fp32 [N, J] | (nibble - 8) * scale + zero |
| `fp8_channel` | weight float8_e4m3fn [N, K], scale fp32 [N] | weight * scale |

Nibbles: value 2j in the low half of byte j, value 2j + 1 in the high half. `pack` chooses scales and
zeros of the integer layouts that are bf16 numbers held in fp32, so that a kernel that wants them in
bf16 reads the same values; a weight that comes quantized keeps its own (fp16 numbers, most often),
which are exact here and rounded by such a kernel. Every layout works row by row: packing rows in
pieces gives the same bytes. Only element-wise fp32 arithmetic and minima and maxima decide bytes,
never the order of a reduction, so packed weights are the same bits on every CPU and with any number
of threads.

Legend: N out, K in, G values per group, J = K / G groups.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

DEFAULT_INT4_GROUP = 64
INT4_GROUPS = (32, 64, 128)
INT8_GROUPS = (16, 32, 64, 128)

# Rows are packed in pieces of about this many values: fp32 scratch stays in cache.
_CHUNK_VALUES = 1 << 20
_FP8_MAX = 448.0
# How much of a group's range int4 may give up at the ends, where that lowers the squared error.
_CLIPS = (1.0, 0.94, 0.88, 0.82)
NO_CLIP = _CLIPS[:1]


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to store a weight.

    Args:
        pack: (weight_NK of any float dtype, group size) to tensors by role.
        unpack: the tensors of `pack` to fp32 [N, K].
        roles: role to (shape, dtype's name) for a weight [N, K] with dtype's name and group size.
    """

    pack: Callable[[torch.Tensor, int], dict[str, torch.Tensor]]
    unpack: Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
    roles: Callable[[tuple[int, ...], str, int], dict[str, tuple[tuple[int, ...], str]]]


def _pack_plain(weight: torch.Tensor, group_size: int) -> dict[str, torch.Tensor]:
    return {"weight": weight.contiguous()}


def _unpack_plain(packed: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return packed["weight"].float()


def _plain_roles(
    shape: tuple[int, ...], dtype: str, group_size: int
) -> dict[str, tuple[tuple[int, ...], str]]:
    return {"weight": (shape, dtype)}


def _pack_int8(weight_NK: torch.Tensor, group_size: int) -> dict[str, torch.Tensor]:
    packed_NK = torch.empty(weight_NK.shape, dtype=torch.int8)
    scale_N = torch.empty(len(weight_NK))
    for rows in _row_chunks(weight_NK):
        chunk = weight_NK[rows].float()
        scale = _nonzero(_bf16_at_least(chunk.abs().amax(1) / 127))
        scale_N[rows] = scale
        packed_NK[rows] = (chunk / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    return {"weight": packed_NK, "scale": scale_N}


def _pack_int8_group(weight_NK: torch.Tensor, group_size: int) -> dict[str, torch.Tensor]:
    """A group is a row of its own to `int8_channel`."""
    num_rows, num_columns = weight_NK.shape
    assert group_size in INT8_GROUPS, f"int8 has no groups of {group_size}"
    assert num_columns % group_size == 0, f"groups of {group_size} do not divide {num_columns}"
    packed = _pack_int8(weight_NK.reshape(-1, group_size), 0)
    return {
        "weight": packed["weight"].view(num_rows, num_columns),
        "scale": packed["scale"].view(num_rows, -1),
    }


def _unpack_int8_group(packed: Mapping[str, torch.Tensor]) -> torch.Tensor:
    codes_NJG = packed["weight"].float().reshape(*packed["scale"].shape, -1)
    return (codes_NJG * packed["scale"][..., None]).flatten(1)


def _int8_group_roles(
    shape: tuple[int, ...], dtype: str, group_size: int
) -> dict[str, tuple[tuple[int, ...], str]]:
    num_rows, num_columns = shape
    scale = ((num_rows, num_columns // group_size), "float32")
    return {"weight": (shape, "int8"), "scale": scale}


def _pack_fp8(weight_NK: torch.Tensor, group_size: int) -> dict[str, torch.Tensor]:
    packed_NK = torch.empty(weight_NK.shape, dtype=torch.float8_e4m3fn)
    scale_N = torch.empty(len(weight_NK))
    for rows in _row_chunks(weight_NK):
        chunk = weight_NK[rows].float()
        scale = _nonzero(chunk.abs().amax(1) / _FP8_MAX)
        scale_N[rows] = scale
        scaled = (chunk / scale[:, None]).clamp_(-_FP8_MAX, _FP8_MAX)
        packed_NK[rows] = scaled.to(torch.float8_e4m3fn)
    return {"weight": packed_NK, "scale": scale_N}


def _unpack_channel(packed: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return packed["weight"].float() * packed["scale"][:, None]


def _channel_roles(dtype: str) -> Callable[..., dict[str, tuple[tuple[int, ...], str]]]:
    def roles(
        shape: tuple[int, ...], logical_dtype: str, group_size: int
    ) -> dict[str, tuple[tuple[int, ...], str]]:
        return {"weight": (shape, dtype), "scale": (shape[:1], "float32")}

    return roles


def pack_int4(
    weight_NK: torch.Tensor, group_size: int, importance_K: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """`int4_group` tensors by role, every value rounded to its nearest level.

    Args:
        importance_K: fp32, how much a column's squared error counts where a group's range is
            chosen; None counts all the same.
    """
    num_rows, num_columns = weight_NK.shape
    levels = torch.empty(num_rows, num_columns // group_size, group_size, dtype=torch.int8)
    scale_NJ = torch.empty(num_rows, num_columns // group_size)
    zero_NJ = torch.empty_like(scale_NJ)
    for rows in _row_chunks(weight_NK):
        groups_NJG = _int4_groups(weight_NK[rows], group_size)
        scale, zero = int4_grid(groups_NJG, importance_K)
        levels[rows] = int4_levels(groups_NJG, scale[..., None], zero[..., None]).to(torch.int8)
        scale_NJ[rows], zero_NJ[rows] = scale, zero
    return pack_int4_levels(levels.flatten(1), scale_NJ, zero_NJ)


def pack_int4_levels(
    levels_NK: torch.Tensor, scale_NJ: torch.Tensor, zero_NJ: torch.Tensor
) -> dict[str, torch.Tensor]:
    """`int4_group` tensors by role out of integers from -8 to 7 and their groups' bf16 numbers."""
    nibbles = (levels_NK + 8).to(torch.uint8)
    return {
        "weight": nibbles[:, 0::2] | (nibbles[:, 1::2] << 4),
        "scale": scale_NJ,
        "zero": zero_NJ,
    }


def int4_levels(values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """The levels, -8 to 7 in fp32, that lie nearest to `values`."""
    return (values - zero).div_(scale).round_().clamp_(-8, 7)


def int4_grid(
    groups_NJG: torch.Tensor,
    importance_K: torch.Tensor | None = None,
    clips: tuple[float, ...] = _CLIPS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros [N, J], bf16 numbers in fp32, with the least squared error among a few
    clipped ranges.

    Range [low, high] of a group, clipped to its middle part c * (high - low):
        scale = c (high - low) / 15;  zero = (low + high) / 2 + scale / 2, so that nibbles 0 and 15
        stand for the clipped ends;  nibble = round((w - zero) / scale) + 8.

    Args:
        importance_K: as in `pack_int4`.
        clips: the ranges that are tried.
    """
    low, high = groups_NJG.amin(-1), groups_NJG.amax(-1)
    weights_JG = None if importance_K is None else importance_K.view(groups_NJG.shape[1:])
    best: tuple[torch.Tensor, ...] | None = None
    for clip in clips:
        step = _bf16_at_least((high - low) * (clip / 15))
        zero = ((low + high) / 2 + step / 2).bfloat16().float()
        scale = _nonzero(step)
        if len(clips) == 1:
            return scale, zero
        levels = int4_levels(groups_NJG, scale[..., None], zero[..., None])
        residual = levels.mul_(scale[..., None]).add_(zero[..., None]).sub_(groups_NJG).square_()
        error = _pairwise_sum(residual if weights_JG is None else residual.mul_(weights_JG))
        if best is None:
            best = (error, scale, zero)
            continue
        better = error < best[0]
        best = (
            torch.where(better, error, best[0]),
            torch.where(better, scale, best[1]),
            torch.where(better, zero, best[2]),
        )
    assert best is not None, "no clips"
    return best[1], best[2]


def _int4_groups(weight_NK: torch.Tensor, group_size: int) -> torch.Tensor:
    """fp32 [N, J, G]."""
    num_columns = weight_NK.shape[1]
    assert group_size in INT4_GROUPS, f"int4 has no groups of {group_size}"
    assert num_columns % group_size == 0, f"groups of {group_size} do not divide {num_columns}"
    return weight_NK.float().reshape(-1, num_columns // group_size, group_size)


def _unpack_int4(packed: Mapping[str, torch.Tensor]) -> torch.Tensor:
    nibbles = torch.stack((packed["weight"] & 15, packed["weight"] >> 4), -1).flatten(1)
    levels_NJG = nibbles.float().sub_(8).reshape(*packed["scale"].shape, -1)
    return (levels_NJG * packed["scale"][..., None] + packed["zero"][..., None]).flatten(1)


def _int4_roles(
    shape: tuple[int, ...], dtype: str, group_size: int
) -> dict[str, tuple[tuple[int, ...], str]]:
    num_rows, num_columns = shape
    scales = ((num_rows, num_columns // group_size), "float32")
    return {"weight": ((num_rows, num_columns // 2), "uint8"), "scale": scales, "zero": scales}


def _row_chunks(weight_NK: torch.Tensor) -> list[slice]:
    num_rows, num_columns = weight_NK.shape
    step = max(_CHUNK_VALUES // num_columns, 1)
    return [slice(start, start + step) for start in range(0, num_rows, step)]


def _bf16_at_least(scale: torch.Tensor) -> torch.Tensor:
    """The least bf16 numbers not below `scale`, as fp32, so that nothing is clipped by rounding.

    bf16 is the upper half of fp32: for numbers >= 0, rounding up is integer arithmetic.
    """
    bits = (scale.view(torch.int32) + 0xFFFF) & ~0xFFFF
    return bits.view(torch.float32)


def _nonzero(scale: torch.Tensor) -> torch.Tensor:
    """Where all values are equal the scale is 1: any would do, and nothing is divided by zero."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _pairwise_sum(values: torch.Tensor) -> torch.Tensor:
    """The sum over the last dim, a power of two, in an order that no CPU changes."""
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        values = values[..., :half] + values[..., half:]
    return values[..., 0]


LAYOUTS: dict[str, Layout] = {
    "plain": Layout(_pack_plain, _unpack_plain, _plain_roles),
    "int8_channel": Layout(_pack_int8, _unpack_channel, _channel_roles("int8")),
    "int8_group": Layout(_pack_int8_group, _unpack_int8_group, _int8_group_roles),
    "int4_group": Layout(pack_int4, _unpack_int4, _int4_roles),
    "fp8_channel": Layout(_pack_fp8, _unpack_channel, _channel_roles("float8_e4m3fn")),
}
