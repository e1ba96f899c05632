"""Hugging Face `compressed-tensors` folders (llm-compressor): FP8, INT8 and packed 4- and 8-bit.

    float-quantized   weight fp8 e4m3 [N, K], weight_scale [N, 1] per channel or [1] per tensor
    int-quantized     weight int8 [N, K],     weight_scale likewise
    pack-quantized    weight_packed int32 [N, K * bits/32], lowest bits first, q + 2^(bits-1);
                      weight_scale [N, J]; weight_shape [2];
                      weight_zero_point int32 [N * bits/32, J] where it is asymmetric; older
                      releases wrote int8 [N, J], q's middle taken, and none where all are 0;
                      weight_g_idx int32 [K] where act-order chose the groups
    value = (q - zero_point) * weight_scale

What a tensor is follows from the tensors there are; layers that the configuration ignores are plain.
Scales of activations and of the KV cache are left out: what activations are is the engine's matter.

Source: neuralmagic/compressed-tensors, pack_quantized and naive_quantized.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from compiler_service.checkpoints.quantized_linear import (
    QuantizedLinear,
    Read,
    Roles,
    Tensors,
    bytes_of,
    dequantized,
    group_for,
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

_FORMATS = (
    "pack-quantized", "float-quantized", "int-quantized", "naive-quantized", "mixed-precision"
)  # fmt: skip
# Transforms that are in the stored weights.
_STORED_TRANSFORMS = ("weight_input", "weight_output")
LEFT_OUT = (
    ".input_scale", ".input_zero_point", ".output_scale", ".output_zero_point",
    ".q_scale", ".k_scale", ".v_scale", ".q_zero_point", ".k_zero_point", ".v_zero_point",
)  # fmt: skip


def find_linears(
    settings: Mapping[str, Any], tensors: Tensors, read: Read
) -> dict[str, QuantizedLinear]:
    """The quantized matrices by the names that they have unquantized.

    Args:
        read: for the small `weight_shape` and `weight_g_idx` alone.
    Raises:
        UnsupportedModel: another compression.
        InvalidModel: tensors contradict each other or the settings.
    """
    kind = settings.get("format")
    if not isinstance(kind, str) or kind not in _FORMATS:
        known = ", ".join(_FORMATS)
        raise UnsupportedModel(architecture=f"compressed-tensors format {kind}", known=known)
    sparsity = settings.get("sparsity_config") or {}
    pattern = sparsity.get("format", "dense") if isinstance(sparsity, dict) else sparsity
    if pattern != "dense":
        found = f"compressed-tensors sparsity {pattern}"
        raise UnsupportedModel(architecture=found, known="dense")
    _require_no_transforms(settings.get("transform_config"))
    said = _said_by_bits(settings)
    drops_zeros = any(
        name.endswith(".weight_zero_point") and stored.dtype == torch.int8
        for name, stored in tensors.items()
    )
    linears = {}
    for name in tensors:
        stem, _, role = name.rpartition(".")
        if role == "weight_packed":
            linears[f"{stem}.weight"] = _Packed(stem, tensors, read, said, drops_zeros).found(read)
        elif role == "weight_scale" and f"{stem}.weight_packed" not in tensors:
            linears[f"{stem}.weight"] = _whole_bytes(stem, tensors)
    return linears


def _require_no_transforms(config: object) -> None:
    """Checks that nothing is to be multiplied while the model runs, as QuIP and SpinQuant's R3, R4 are.

    What only rotates weights was done when they were stored.

    Raises:
        UnsupportedModel: something is.
    """
    if not config:
        return
    groups = config.get("config_groups") if isinstance(config, dict) else None
    schemes = list(groups.values()) if isinstance(groups, dict) else [None]
    for scheme in schemes:
        steps = scheme.get("apply") if isinstance(scheme, dict) else None
        for step in steps if isinstance(steps, list) else [None]:
            place = step.get("location") if isinstance(step, dict) else None
            if place not in _STORED_TRANSFORMS:
                found = f"compressed-tensors with a transform of {place or 'an unknown place'}"
                raise UnsupportedModel(architecture=found, known=", ".join(_STORED_TRANSFORMS))


@dataclass(frozen=True, slots=True)
class _Said:
    """What the settings say of weights of so many bits; the defaults say nothing."""

    is_asymmetric: bool = False
    group_size: int | None = None


def _said_by_bits(settings: Mapping[str, Any]) -> dict[int, _Said]:
    """By number of bits; nothing where groups of layers with as many bits differ."""
    said: dict[int, set[_Said]] = {}
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise InvalidModel(problem="quantization_config has no config_groups")
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, dict) else group
        if weights is None:
            continue  # quantizes activations alone
        bits = weights.get("num_bits") if isinstance(weights, dict) else None
        if not isinstance(weights, dict) or not isinstance(bits, int):
            raise InvalidModel(problem="quantization_config has a group without bits of weights")
        size = {"channel": -1, "group": group_size_of(weights, "group_size")}.get(
            str(weights.get("strategy"))
        )
        said.setdefault(bits, set()).add(_Said(not weights.get("symmetric", True), size))
    if not said:
        raise InvalidModel(problem="quantization_config has no group that quantizes weights")
    return {bits: answers.pop() for bits, answers in said.items() if len(answers) == 1}


def _whole_bytes(stem: str, tensors: Tensors) -> QuantizedLinear:
    """An fp8 or int8 weight: a scale for each channel; one for all of them is written N times."""
    parts = {"weight": f"{stem}.weight", "weight_scale": f"{stem}.weight_scale"}
    stored = tensors.get(parts["weight"])
    if stored is None or len(stored.shape) != 2:
        raise InvalidModel(problem=f"{parts['weight_scale']} has no matrix {parts['weight']}")
    layouts = {torch.float8_e4m3fn: "fp8_channel", torch.int8: "int8_channel"}
    if stored.dtype not in layouts:
        problem = f"{parts['weight']} has a weight_scale and dtype {stored.dtype_name}"
        raise InvalidModel(problem=f"{problem}; F8_E4M3 or I8 belong to one")
    if f"{stem}.weight_zero_point" in tensors:
        found = f"compressed-tensors whole bytes with zero points, {stem}.weight,"
        raise UnsupportedModel(architecture=found, known="symmetric")
    num_rows, num_columns = stored.shape
    scale = tensors[parts["weight_scale"]]
    per_tensor, per_channel = ((), (1,), (1, 1)), ((num_rows,), (num_rows, 1))
    kind = "fp8" if stored.dtype == torch.float8_e4m3fn else "int8"
    if scale.shape in per_channel:
        name = f"compressed-tensors {kind}, per channel"
    elif scale.shape in per_tensor:
        name = f"compressed-tensors {kind}, per tensor"
    else:
        found = f"compressed-tensors {kind} with a {list(scale.shape)} scale, {stem}.weight,"
        raise UnsupportedModel(architecture=found, known="a scale per tensor or per channel")
    require_part(tensors, parts["weight_scale"], scale.shape, FLOAT_DTYPES)

    def pack(read: Read) -> Roles:
        scale_N = read(parts["weight_scale"]).float().flatten().expand(num_rows).contiguous()
        return {"weight": read(parts["weight"]), "scale": scale_N}

    return QuantizedLinear((num_rows, num_columns), name, parts, layouts[stored.dtype], pack=pack)


class _Packed:
    """A pack-quantized matrix: checked when made, then given in the form that holds it."""

    def __init__(
        self,
        stem: str,
        tensors: Tensors,
        read: Read,
        said_by_bits: Mapping[int, _Said],
        drops_zeros: bool,
    ) -> None:
        roles = ("weight_packed", "weight_scale", "weight_shape")
        self.parts = {role: f"{stem}.{role}" for role in roles}
        require_part(tensors, self.parts["weight_shape"], (2,), (torch.int64, torch.int32))
        num_rows, num_columns = read(self.parts["weight_shape"]).tolist()
        packed = tensors[self.parts["weight_packed"]]
        words = packed.shape[-1] if len(packed.shape) == 2 else 0
        if (
            min(num_columns, words) < 1
            or packed.shape[:1] != (num_rows,)
            or words * 32 % num_columns
        ):
            problem = f"{self.parts['weight_packed']} has shape {list(packed.shape)}, which no"
            raise InvalidModel(problem=f"{problem} [{num_rows}, {num_columns}] packs into")
        self.bits, self.shape = words * 32 // num_columns, (num_rows, num_columns)
        if self.bits not in (4, 8):
            found = f"compressed-tensors packed in {self.bits} bits, {stem}.weight,"
            raise UnsupportedModel(architecture=found, known="4, 8")
        require_part(tensors, self.parts["weight_packed"], packed.shape, (torch.int32,))
        scale = tensors.get(self.parts["weight_scale"])
        self.count = scale.shape[-1] if scale is not None and scale.shape else 0
        require_part(tensors, self.parts["weight_scale"], (num_rows, self.count), FLOAT_DTYPES)
        self.scales = tensors[self.parts["weight_scale"]]
        said = said_by_bits.get(self.bits, _Said())
        name = self.parts["weight_scale"]
        self.group = num_groups(name, self.count, num_columns, said.group_size)
        zeros = tensors.get(f"{stem}.weight_zero_point")
        self.has_zeros = zeros is not None
        if self.has_zeros or (said.is_asymmetric and not drops_zeros):
            self.parts["weight_zero_point"] = f"{stem}.weight_zero_point"
            shape, dtype = (-(-num_rows * self.bits // 32), self.count), torch.int32
            if zeros is not None and zeros.dtype == torch.int8:
                shape, dtype = (num_rows, self.count), torch.int8
            require_part(tensors, self.parts["weight_zero_point"], shape, (dtype,))
        if f"{stem}.weight_g_idx" in tensors:
            self.parts["weight_g_idx"] = f"{stem}.weight_g_idx"
            dtypes = (torch.int32, torch.int64)
            require_part(tensors, self.parts["weight_g_idx"], (num_columns,), dtypes)
        groups = groups_text(self.scales, self.group, num_columns)
        self.name = f"compressed-tensors {self.bits}-bit, {groups}"

    def found(self, read: Read) -> QuantizedLinear:
        """In a layout, or dequantized and said why."""
        name = f"{self.name} with zero points" if self.has_zeros else self.name
        layout = "int4_group" if self.bits == 4 else "int8_group"
        is_reordered = not torch.equal(self._groups(read), self._groups_in_order())
        held = 0 if is_reordered else self._held(layout)
        if held:
            return QuantizedLinear(
                self.shape, name, self.parts, layout, held, lambda read: self._pack(read, held)
            )
        name = f"{name} with act-order" if is_reordered else name
        return QuantizedLinear(self.shape, name, self.parts, dequantize=self._dequantize)

    def _held(self, layout: str) -> int:
        """The layout's group size; 0 where it does not hold the matrix."""
        if not self.has_zeros:
            return group_for(layout, self.group, self.shape[1])
        return int4_group_for(self.scales, self.group, self.shape[1]) if self.bits == 4 else 0

    def _groups_in_order(self) -> torch.Tensor:
        return torch.arange(self.shape[1]) // self.group

    def _groups(self, read: Read) -> torch.Tensor:
        """Each column's group; int64 [K].

        Raises:
            InvalidModel: there are no such groups.
        """
        if "weight_g_idx" not in self.parts:
            return self._groups_in_order()
        groups_K = read(self.parts["weight_g_idx"]).long()
        if bool((groups_K == -1).all()):  # reserved and never used
            return self._groups_in_order()
        if int(groups_K.min()) < 0 or int(groups_K.max()) >= self.count:
            problem = f"{self.parts['weight_g_idx']} names groups other than 0 to {self.count - 1}"
            raise InvalidModel(problem=problem)
        return groups_K

    def _pack(self, read: Read, held: int) -> Roles:
        codes = bytes_of(read(self.parts["weight_packed"]))
        scale_NJ = spread(read(self.parts["weight_scale"]), self.shape[1], self.group, held)
        if self.bits == 8:
            return {"weight": (codes ^ 128).view(torch.int8), "scale": scale_NJ}
        zero_NJ = spread(self._zeros(read), self.shape[1], self.group, held)
        return int4_roles(codes, scale_NJ, zero_NJ)

    def _dequantize(self, read: Read) -> torch.Tensor:
        codes_NK = self._unpacked(read(self.parts["weight_packed"]))
        scale_NJ = read(self.parts["weight_scale"]).float()
        return dequantized(codes_NK, scale_NJ, self._zeros(read), self._groups(read))

    def _zeros(self, read: Read) -> torch.Tensor:
        """Zero points as codes have them, that is with 2^(bits-1) added; fp32 [N, J]."""
        num_rows, middle = self.shape[0], float(1 << (self.bits - 1))
        if not self.has_zeros:
            return torch.full((num_rows, self.count), middle)
        stored = read(self.parts["weight_zero_point"])
        if stored.dtype == torch.int8:
            return stored.float() + middle
        return self._unpacked(stored.T).T[:num_rows].float()

    def _unpacked(self, words: torch.Tensor) -> torch.Tensor:
        return nibbles_of(words) if self.bits == 4 else bytes_of(words)
