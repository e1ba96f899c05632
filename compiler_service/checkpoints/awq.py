"""AutoAWQ folders (`version: gemm`): 4-bit weights in groups, with zero points.

    qweight int32 [K, N/8], qzeros int32 [J, N/8]   eight columns in an int32, in AWQ's own order
    scales  fp16 [J, N]                             value = (q - z) * scale

Source: casper-hansen/AutoAWQ, awq/modules/linear/gemm.py.
"""

from collections.abc import Mapping
from typing import Any

import torch

from compiler_service.checkpoints.quantized_linear import (
    QuantizedLinear,
    Read,
    Roles,
    Tensors,
    dequantized,
    group_size_of,
    groups_text,
    int4_group_for,
    int4_roles,
    nibbles_of,
    num_groups,
    require_part,
    spread,
)
from compiler_service.checkpoints.safetensors_files import FLOAT_DTYPES
from shared.errors import InvalidModel, UnsupportedModel

# Nibble i of an int32, from the lowest bits, belongs to column _ORDER[i] of its eight.
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
# What says how it is packed: AutoAWQ's field, and GPTQModel's, by its newer and older name.
_PACKING_FIELDS = ("version", "checkpoint_format", "format")


def find_linears(settings: Mapping[str, Any], tensors: Tensors) -> dict[str, QuantizedLinear]:
    """The quantized matrices by the names that they have unquantized.

    Raises:
        UnsupportedModel: another packing or number of bits.
        InvalidModel: tensors contradict each other or the settings.
    """
    for field in _PACKING_FIELDS:
        version = str(settings.get(field) or "gemm").lower()
        if version != "gemm":
            raise UnsupportedModel(architecture=f"AWQ version {version}", known="gemm")
    bits = settings.get("bits", settings.get("w_bit", 4))
    if bits != 4:
        raise UnsupportedModel(architecture=f"AWQ with {bits} bits", known="4")
    wanted = group_size_of(settings, "group_size", "q_group_size")
    return {
        f"{stem}.weight": _linear(stem, tensors, wanted)
        for stem in (n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight"))
    }


def _linear(stem: str, tensors: Tensors, wanted_group: int | None) -> QuantizedLinear:
    parts = {role: f"{stem}.{role}" for role in ("qweight", "qzeros", "scales")}
    stored = tensors[parts["qweight"]].shape
    if len(stored) != 2 or 0 in stored:
        raise InvalidModel(problem=f"{parts['qweight']} has shape {list(stored)}, not [K, N/8]")
    num_columns, num_rows = stored[0], stored[1] * 8
    scales = tensors.get(parts["scales"])
    count = scales.shape[0] if scales is not None and scales.shape else 0
    require_part(tensors, parts["qweight"], stored, (torch.int32,))
    require_part(tensors, parts["scales"], (count, num_rows), FLOAT_DTYPES)
    require_part(tensors, parts["qzeros"], (count, num_rows // 8), (torch.int32,))
    group = num_groups(parts["scales"], count, num_columns, wanted_group)
    held = int4_group_for(tensors[parts["scales"]], group, num_columns)

    def pack(read: Read) -> Roles:
        codes_NK = _unpacked(read(parts["qweight"]))
        scale_NJ = spread(read(parts["scales"]).T, num_columns, group, held)
        zero_NJ = spread(_unpacked(read(parts["qzeros"])), num_columns, group, held)
        return int4_roles(codes_NK[:, 0::2] | (codes_NK[:, 1::2] << 4), scale_NJ, zero_NJ)

    def dequantize(read: Read) -> torch.Tensor:
        scale_NJ = read(parts["scales"]).T.float()
        zero_NJ = _unpacked(read(parts["qzeros"])).float()
        groups_K = torch.arange(num_columns) // group
        return dequantized(_unpacked(read(parts["qweight"])), scale_NJ, zero_NJ, groups_K)

    shape, name = (
        (num_rows, num_columns),
        f"AWQ 4-bit, {groups_text(tensors[parts['scales']], group, num_columns)}",
    )
    if not held:
        return QuantizedLinear(shape, name, parts, dequantize=dequantize)
    return QuantizedLinear(shape, name, parts, "int4_group", held, pack)


def _unpacked(packed_JN: torch.Tensor) -> torch.Tensor:
    """uint8 [N, J] of int32 [J, N/8]."""
    nibbles = nibbles_of(packed_JN).view(*packed_JN.shape, 8)
    places = torch.tensor(_ORDER).argsort()
    return nibbles[..., places].flatten(1).T.contiguous()
