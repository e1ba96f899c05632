"""How a GPU's kernels read a weight: the order that they widen without shuffles, made when an engine is loaded.

What an engine stores is the same for all arches (layouts.py); this is the same for all GPUs. Words of 16 bits hold
the values of columns that are far apart, and neighbouring words those of neighbouring columns, so that a shift and a
mask give the values of a whole part of a chunk, in the order in which x has them:

| layout | chunk of K | nibble or byte i of word j stands for column | beside it |
|---|---|---|---|
| `int4_group` | 4 groups of G columns | i * G + j | int32 [B, N, 4]: bf16 scale, bf16 zero above |
| others | | as stored | |

Rows end in whole chunks: groups beyond K have a scale and a zero of 0.

Legend: N out, K in, G values per group, J groups along K, padded to whole chunks; B chunks.
"""

from collections.abc import Mapping

import torch

from shared.ir import WeightSpec

Packed = Mapping[str, torch.Tensor]

# Groups in a chunk: nibbles of a word.
INT4_PARTS = 4


def is_arranged(spec: WeightSpec) -> bool:
    """Claims that kernels read this weight in another order than that which is stored."""
    return spec.layout == "int4_group"


def arranged(spec: WeightSpec, packed: Packed) -> dict[str, torch.Tensor]:
    """The tensors that kernels read, by role, out of those that are stored; on the device of `packed`."""
    if not is_arranged(spec):
        return dict(packed)
    stored_NH, group = packed["weight"], spec.group_size
    num_rows, num_columns = spec.shape
    missing = -num_columns % (INT4_PARTS * group)
    nibbles_NK = torch.stack((stored_NH & 15, stored_NH >> 4), -1).view(num_rows, num_columns)
    nibbles_NK = torch.nn.functional.pad(nibbles_NK, (0, missing))
    parts = nibbles_NK.view(num_rows, -1, INT4_PARTS, group).unbind(2)  # [N, B, G] each
    bytes_NBG2 = torch.stack((parts[0] | parts[1] << 4, parts[2] | parts[3] << 4), -1)
    groups_NJ2 = torch.stack((packed["scale"], packed["zero"]), -1).bfloat16()
    groups_NJ2 = torch.nn.functional.pad(groups_NJ2, (0, 0, 0, missing // group))
    groups_NB = groups_NJ2.view(torch.int32).view(num_rows, -1, INT4_PARTS)
    return {
        "weight": bytes_NBG2.view(torch.int16).view(num_rows, -1),
        "scale": groups_NB.transpose(0, 1).contiguous(),
    }


def stored(spec: WeightSpec, arranged: Packed) -> dict[str, torch.Tensor]:
    """The inverse of `arranged`: exact where scales and zeros are bf16 numbers, as those of our schemes are."""
    if not is_arranged(spec):
        return dict(arranged)
    num_rows, num_columns = spec.shape
    words_NBG = arranged["weight"].view(num_rows, -1, spec.group_size)
    parts = [(words_NBG >> 4 * i & 15).to(torch.uint8) for i in range(INT4_PARTS)]
    nibbles_NK = torch.stack(parts, 2).view(num_rows, -1)[:, :num_columns]
    num_groups = num_columns // spec.group_size
    groups_NB = arranged["scale"].transpose(0, 1).reshape(num_rows, -1)[:, :num_groups].contiguous()
    groups_NJ2 = groups_NB.view(torch.bfloat16).view(num_rows, num_groups, 2).float()
    scale_NJ, zero_NJ = groups_NJ2.unbind(-1)
    return {
        "weight": nibbles_NK[:, 0::2] | nibbles_NK[:, 1::2] << 4,
        "scale": scale_NJ.contiguous(),
        "zero": zero_NJ.contiguous(),
    }
