"""GPTQ folders (AutoGPTQ, GPTQModel): 4- or 8-bit weights in groups, with zero points.

    qweight int32 [K * bits/32, N]   rows of K packed along it, lowest bits first
    qzeros  int32 [J, N * bits/32]   zero points; format `gptq` stores z - 1, `gptq_v2` stores z; GPTQModel
                                     calls it `checkpoint_format`, or `format` alone
    scales  fp16 [J, N]              value[k, n] = (q - z[g_idx[k], n]) * scales[g_idx[k], n]
    g_idx   int32 [K]                group of each row of K; k // G unless act-order chose otherwise;
                                     the last group is shorter where G does not divide K

Source: AutoGPTQ, qlinear_tritonv2.py; GPTQModel, convert_gptq_v1_to_v2_format.
"""

from collections.abc import Mapping
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

# One in every field of an int32: what format `gptq` took from the words of its zero points.
_ONES = {4: 0x11111111, 8: 0x01010101}
_FORMATS = ("gptq", "gptq_v2")


def find_linears(
    settings: Mapping[str, Any], tensors: Tensors, read: Read
) -> dict[str, QuantizedLinear]:
    """The quantized matrices by the names that they have unquantized.

    Args:
        read: for the small `g_idx` alone.
    Raises:
        UnsupportedModel: another packing or number of bits.
        InvalidModel: tensors contradict each other or the settings.
    """
    packing = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if not isinstance(packing, str) or packing not in _FORMATS or settings.get("is_marlin_format"):
        found = "marlin" if settings.get("is_marlin_format") else packing
        raise UnsupportedModel(architecture=f"GPTQ packed as {found}", known=", ".join(_FORMATS))
    bits = settings.get("bits")
    if not isinstance(bits, int) or bits not in _ONES:
        raise UnsupportedModel(architecture=f"GPTQ with {bits} bits", known="4, 8")
    rules = settings.get("dynamic") or {}
    # `-:pattern` leaves layers alone, which their tensors show; the others override bits or groups.
    if not isinstance(rules, dict) or not all(str(rule).startswith("-:") for rule in rules):
        found = "GPTQ with dynamic bits per layer"
        raise UnsupportedModel(architecture=found, known="one for all, and -:pattern rules")
    return {
        f"{stem}.weight": _Linear(stem, settings, tensors, packing, bits).found(read)
        for stem in (n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight"))
    }


class _Linear:
    """One matrix: checked when made, then given in the form that holds it."""

    def __init__(
        self, stem: str, settings: Mapping[str, Any], tensors: Tensors, packing: str, bits: int
    ) -> None:
        self.bits, self.is_v1 = bits, packing == "gptq"
        self.parts = {role: f"{stem}.{role}" for role in ("qweight", "qzeros", "scales")}
        stored = tensors[self.parts["qweight"]].shape
        if len(stored) != 2 or 0 in stored:
            problem = f"{self.parts['qweight']} has shape {list(stored)}, not [K * bits/32, N]"
            raise InvalidModel(problem=problem)
        self.shape = stored[1], stored[0] * 32 // bits
        num_rows, num_columns = self.shape
        scales = tensors.get(self.parts["scales"])
        count = scales.shape[0] if scales is not None and scales.shape else 0
        require_part(tensors, self.parts["qweight"], stored, (torch.int32,))
        require_part(tensors, self.parts["scales"], (count, num_rows), FLOAT_DTYPES)
        require_part(tensors, self.parts["qzeros"], (count, num_rows * bits // 32), (torch.int32,))
        self.group = num_groups(
            self.parts["scales"], count, num_columns, group_size_of(settings, "group_size")
        )
        if f"{stem}.g_idx" in tensors:
            self.parts["g_idx"] = f"{stem}.g_idx"
            require_part(tensors, self.parts["g_idx"], (num_columns,), (torch.int32, torch.int64))
        self.held8 = group_for("int8_group", self.group, num_columns)
        stored_scales = tensors[self.parts["scales"]]
        self.held4 = int4_group_for(stored_scales, self.group, num_columns)
        self.count = count
        self.is_symmetric = bool(settings.get("sym", False))
        self.name = f"GPTQ {bits}-bit, {groups_text(stored_scales, self.group, num_columns)}"

    def found(self, read: Read) -> QuantizedLinear:
        """In a layout, or dequantized and said why."""
        if self._is_reordered(read):
            name = f"{self.name} with act-order"
            return QuantizedLinear(self.shape, name, self.parts, dequantize=self._dequantize)
        if self.bits == 4 and self.held4:
            return QuantizedLinear(
                self.shape, self.name, self.parts, "int4_group", self.held4, self._pack_int4
            )
        if self.bits == 8 and self.is_symmetric and self.held8:
            return QuantizedLinear(
                self.shape, self.name, self.parts, "int8_group", self.held8, self._pack_int8
            )
        name = self.name if self.bits == 4 else f"{self.name} with zero points"
        return QuantizedLinear(self.shape, name, self.parts, dequantize=self._dequantize)

    def _is_reordered(self, read: Read) -> bool:
        if "g_idx" not in self.parts:
            return False
        groups_K = read(self.parts["g_idx"]).long()
        if int(groups_K.min()) < 0 or int(groups_K.max()) >= self.count:
            problem = f"{self.parts['g_idx']} names groups other than 0 to {self.count - 1}"
            raise InvalidModel(problem=problem)
        return not torch.equal(groups_K, torch.arange(self.shape[1]) // self.group)

    def _pack_int4(self, read: Read) -> Roles:
        # [K/8, N] transposed: a row's int32s, whose bytes are our packing.
        packed_NK = read(self.parts["qweight"]).T.contiguous().view(torch.uint8)
        scale_NJ, zero_NJ = self._scales(read), self._zeros(read)
        num_columns, group, held = self.shape[1], self.group, self.held4
        return int4_roles(
            packed_NK,
            spread(scale_NJ, num_columns, group, held),
            spread(zero_NJ, num_columns, group, held),
        )

    def _pack_int8(self, read: Read) -> Roles:
        if not bool((self._zeros(read) == 128).all()):
            problem = f"{self.parts['qzeros']} is not symmetric, as the configuration says"
            raise InvalidModel(problem=problem)
        codes_NK = bytes_of(read(self.parts["qweight"]).T)
        # q - 128: the sign bit turned.
        scale_NJ = spread(self._scales(read), self.shape[1], self.group, self.held8)
        return {"weight": (codes_NK ^ 128).view(torch.int8), "scale": scale_NJ}

    def _dequantize(self, read: Read) -> torch.Tensor:
        unpacked = nibbles_of if self.bits == 4 else bytes_of
        codes_NK = unpacked(read(self.parts["qweight"]).T)
        groups_K = torch.arange(self.shape[1]) // self.group
        if "g_idx" in self.parts:
            groups_K = read(self.parts["g_idx"]).long()
        return dequantized(codes_NK, self._scales(read), self._zeros(read), groups_K)

    def _zeros(self, read: Read) -> torch.Tensor:
        """Zero points, fp32 [N, J]."""
        words = read(self.parts["qzeros"])
        if self.is_v1:
            # As words: a zero point of 0 borrowed from its neighbour when 1 was taken.
            words = words + _ONES[self.bits]
        zeros_JN = nibbles_of(words) if self.bits == 4 else bytes_of(words)
        return zeros_JN.T.float()

    def _scales(self, read: Read) -> torch.Tensor:
        """fp32 [N, J]."""
        return read(self.parts["scales"]).T.float()
