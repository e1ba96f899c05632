"""A weight matrix that a checkpoint holds quantized, as several tensors; what the formats share.

    value[n, k] = (code[n, k] - zero[n, j]) * scale[n, j]        group j of column k

A format finds its matrices by their tensors' names, checks shapes without reading, and gives each
matrix in one of our layouts, value for value, or dequantized where none can hold it.

Legend: N out, K in, J groups along K, G values per group.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from compiler_service.checkpoints.safetensors_files import StoredTensor
from kernels.linear.layouts import INT4_GROUPS, INT8_GROUPS, LAYOUTS
from shared.errors import InvalidModel

Read = Callable[[str], torch.Tensor]
Roles = dict[str, torch.Tensor]
Tensors = Mapping[str, StoredTensor]

_CHUNK_VALUES = 1 << 20


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """One matrix [N, K].

    Args:
        format: in its maker's words.
        parts: the tensors that it is made of, by role in the format.
        pack: its values by the roles of `layout`; None where no layout holds them.
        dequantize: fp32 [N, K]; needed where there is no `pack`.
        group_size: of the layout.
    """

    shape: tuple[int, int]
    format: str
    parts: Mapping[str, str]
    layout: str = ""
    group_size: int = 0
    pack: Callable[[Read], Roles] | None = None
    dequantize: Callable[[Read], torch.Tensor] | None = None

    def read(self, read: Read) -> torch.Tensor:
        """The values, fp32 [N, K]."""
        if self.pack is not None:
            return _unpacked_by_rows(self.layout, self.pack(read), self.shape)
        assert self.dequantize is not None, f"{self.format} cannot be read"
        return self.dequantize(read)


def group_for(layout: str, group_size: int, num_columns: int) -> int:
    """Values per scale in `layout` that hold groups of `group_size`, whose scales may be repeated.

    0 where the layout has no such groups. The last group may be shorter than the others.
    """
    known = {"int4_group": INT4_GROUPS, "int8_group": INT8_GROUPS}[layout]
    fitting = (size for size in known if group_size % size == 0 and num_columns % size == 0)
    return max(fitting, default=0)


def int4_group_for(scales: StoredTensor, group_size: int, num_columns: int) -> int:
    """`group_for` int4 with zero points: 0 also for fp32 scales, with which zeros are not exact."""
    if scales.dtype == torch.float32:
        return 0
    return group_for("int4_group", group_size, num_columns)


def spread(scale_NJ: torch.Tensor, num_columns: int, group_size: int, held: int) -> torch.Tensor:
    """Scales of groups of `group_size`, repeated for each `held` columns in them; fp32."""
    return scale_NJ.float()[:, torch.arange(0, num_columns, held) // group_size]


def nibbles_of(packed: torch.Tensor) -> torch.Tensor:
    """Eight values of each int32, lowest bits first, along the last dim; uint8."""
    as_bytes = packed.contiguous().view(torch.uint8)
    return torch.stack((as_bytes & 15, as_bytes >> 4), -1).flatten(-2)


def bytes_of(packed: torch.Tensor) -> torch.Tensor:
    """Four values of each int32, lowest bits first, along the last dim; uint8."""
    return packed.contiguous().view(torch.uint8)


def int4_roles(packed_NK: torch.Tensor, scale_NJ: torch.Tensor, zero_NJ: torch.Tensor) -> Roles:
    """`int4_group` of nibbles with zero points: (nibble - z) * s = (nibble - 8) * s + (8 - z) * s.

    Exact for fp16 and bf16 scales: one has at most 11 significant bits, and 8 - z at most 4.

    Args:
        packed_NK: uint8 [N, K/2], low nibble first.
        zero_NJ: zero points, 0 to 16.
    """
    return {"weight": packed_NK, "scale": scale_NJ, "zero": (8 - zero_NJ.float()) * scale_NJ}


def dequantized(
    codes_NK: torch.Tensor, scale_NJ: torch.Tensor, zero_NJ: torch.Tensor, groups_K: torch.Tensor
) -> torch.Tensor:
    """(code - zero) * scale, fp32 [N, K], with each column's group; a few rows at a time.

    Args:
        codes_NK: uint8 or int8.
    """
    values_NK = torch.empty(codes_NK.shape)
    num_rows = max(_CHUNK_VALUES // codes_NK.shape[1], 1)
    for start in range(0, len(codes_NK), num_rows):
        rows = slice(start, start + num_rows)
        chunk = codes_NK[rows].float().sub_(zero_NJ[rows][:, groups_K])
        values_NK[rows] = chunk.mul_(scale_NJ[rows][:, groups_K])
    return values_NK


def _unpacked_by_rows(layout: str, roles: Roles, shape: tuple[int, int]) -> torch.Tensor:
    """fp32 [N, K] of a layout's tensors, a few rows at a time: scratch stays small beside it."""
    values_NK = torch.empty(shape)
    num_rows = max(_CHUNK_VALUES // shape[1], 1)
    for start in range(0, shape[0], num_rows):
        rows = slice(start, start + num_rows)
        chunk = {role: tensor[rows] for role, tensor in roles.items()}
        values_NK[rows] = LAYOUTS[layout].unpack(chunk)
    return values_NK


def require_part(
    tensors: Tensors, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    """Checks a tensor of a format.

    Raises:
        InvalidModel: it is missing, or has another shape or dtype.
    """
    stored = tensors.get(name)
    if stored is None:
        raise InvalidModel(problem=f"{name} is missing, and its weight is quantized")
    if stored.shape != shape:
        problem = f"{name} has shape {list(stored.shape)}, its weight implies {list(shape)}"
        raise InvalidModel(problem=problem)
    if stored.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise InvalidModel(problem=f"{name} has dtype {stored.dtype_name}, not {wanted}")


def num_groups(name: str, count: int, num_columns: int, wanted: int | None) -> int:
    """Columns per group where there are `count` scales along `num_columns`.

    The last group is shorter where the configured size does not divide the columns.

    Args:
        name: of the scales.
        wanted: what the configuration says, in columns; -1 = all of them, None = nothing.
    Raises:
        InvalidModel: there are none, or they do not divide, or not as the configuration says.
    """
    expected = num_columns if wanted is None or wanted == -1 else min(wanted, num_columns)
    if count > 0 and num_columns > 0 and count == -(-num_columns // expected):
        return expected
    if count < 1 or num_columns < 1 or num_columns % count:
        raise InvalidModel(problem=f"{name} has {count} groups for {num_columns} columns")
    size = num_columns // count
    if wanted is not None:
        problem = f"{name} has groups of {size} columns and the configuration says {expected}"
        raise InvalidModel(problem=problem)
    return size


def groups_text(scales: StoredTensor, group_size: int, num_columns: int) -> str:
    """For people: what shares a scale, and its dtype where that is fp32."""
    last = num_columns % group_size
    text = "per channel" if group_size == num_columns else f"groups of {group_size}"
    text = f"{text}, the last of {last}" if last else text
    return f"{text}, fp32 scales" if scales.dtype == torch.float32 else text


def group_size_of(settings: Mapping[str, Any], *names: str) -> int | None:
    """The group size that the settings give under one of these names; -1 = a whole row.

    Raises:
        InvalidModel: it is neither that nor a positive number.
    """
    for name in names:
        value = settings.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not (value > 0 or value == -1):
            raise InvalidModel(problem=f"quantization_config's {name} is {value!r}")
        return value
    return None
