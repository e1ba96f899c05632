"""Tiny checkpoints quantized as the public formats define them, packed the slow and obvious way.

What a weight is worth is computed from its codes, zero points and scales before anything is packed,
so that a reader is compared with the definition and never with itself.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import edit_config, write_checkpoint

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Codes:
    """value[n, k] = (q[n, k] - z[n, g[k]]) * s[n, g[k]]"""

    q: np.ndarray[Any, Any]
    z: np.ndarray[Any, Any]
    s: torch.Tensor
    g: np.ndarray[Any, Any]

    @property
    def values(self) -> torch.Tensor:
        exact = (self.q - self.z[:, self.g]) * self.s.double().numpy()[:, self.g]
        return torch.from_numpy(exact).float()


def quantize(
    weight: torch.Tensor, bits: int, group_size: int, *, symmetric: bool, scale_dtype: torch.dtype,
    act_order_seed: int | None = None,
) -> Codes:  # fmt: skip
    """Round to nearest in groups of columns; act-order deals columns to groups at random."""
    num_rows, num_columns = weight.shape
    size = num_columns if group_size == -1 else group_size
    g = np.arange(num_columns) // size
    if act_order_seed is not None:
        g = np.random.default_rng(act_order_seed).permutation(g)
    q = np.zeros((num_rows, num_columns), dtype=np.int64)
    num_groups = -(-num_columns // size)
    z = np.zeros((num_rows, num_groups), dtype=np.int64)
    s = torch.zeros(num_rows, num_groups, dtype=scale_dtype)
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    for j in range(num_groups):
        part = weight[:, g == j].float()
        low, high = part.amin(1), part.amax(1)
        step = part.abs().amax(1) / (middle - 1) if symmetric else (high - low) / top
        s[:, j] = step.to(scale_dtype)
        step = s[:, j].float()
        z[:, j] = middle if symmetric else (-low / step).round().clamp(0, top).numpy()
        levels = (part / step[:, None]).round() + torch.from_numpy(z[:, j])[:, None]
        q[:, g == j] = levels.clamp(0, top).numpy()
    return Codes(q, z, s, g)


def packed(fields: np.ndarray[Any, Any], bits: int) -> torch.Tensor:
    """int32 words along the last dim, lowest bits first."""
    per_word = 32 // bits
    padded = np.pad(fields, [(0, 0), (0, -fields.shape[1] % per_word)])
    words = np.zeros((len(padded), padded.shape[1] // per_word), dtype=np.uint32)
    for i in range(per_word):
        words |= padded[:, i::per_word].astype(np.uint32) << np.uint32(bits * i)
    return torch.from_numpy(words.view(np.int32).copy())


def awq_tensors(codes: Codes) -> dict[str, torch.Tensor]:
    """AutoAWQ, GEMM: eight columns of N in a word, in its order."""

    def words(fields_NJ: np.ndarray[Any, Any]) -> torch.Tensor:
        eights = fields_NJ.T.reshape(fields_NJ.shape[1], -1, 8)
        return packed(eights[:, :, AWQ_ORDER].reshape(len(eights), -1), 4)

    return {"qweight": words(codes.q), "qzeros": words(codes.z), "scales": codes.s.T.contiguous()}


def gptq_tensors(codes: Codes, bits: int, *, is_v2: bool = False) -> dict[str, torch.Tensor]:
    """AutoGPTQ: K packed in `qweight`, N in `qzeros`; the older format stores z - 1."""
    stored = codes.z if is_v2 else codes.z - 1
    return {
        "qweight": packed(codes.q, bits).T.contiguous(),
        "qzeros": packed(stored.T, bits),
        "scales": codes.s.T.contiguous(),
        "g_idx": torch.from_numpy(codes.g.astype(np.int32)),
    }


def packed_tensors(codes: Codes, bits: int, *, symmetric: bool) -> dict[str, torch.Tensor]:
    """compressed-tensors, pack-quantized: zero points packed along N."""
    tensors = {
        "weight_packed": packed(codes.q, bits),
        "weight_scale": codes.s,
        "weight_shape": torch.tensor(codes.q.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = packed(codes.z.T, bits).T.contiguous()
    if (np.diff(codes.g) < 0).any():
        tensors["weight_g_idx"] = torch.from_numpy(codes.g.astype(np.int32))
    return tensors


def compressed_settings(form: str, bits: int, **weights: Any) -> dict[str, Any]:
    """quantization_config as llm-compressor writes it."""
    scheme = {"num_bits": bits, "type": "int", "symmetric": True, **weights}
    group = {"targets": ["Linear"], "weights": scheme, "input_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": group},
    }  # fmt: skip


# Tensors of one linear, and its values.
Quantize = Callable[[torch.Tensor], tuple[dict[str, torch.Tensor], torch.Tensor]]


def write_quantized(
    folder: Path, settings: dict[str, Any], quantize_one: Quantize, family: str = "llama",
    *, quantizes_head: bool = False, settings_file: str = "", **sizes: Any,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Writes a checkpoint whose linears went through `quantize_one`; what each is worth, by name.

    Args:
        settings_file: where settings go instead of config.json.
    """
    sizes = {"dtype": torch.float16, "seed": 5, **sizes}
    write_checkpoint(folder, family, **sizes)
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        is_linear = "_proj.weight" in name or (quantizes_head and name == "lm_head.weight")
        if not is_linear:
            tensors[name] = tensor
            continue
        stored, values[name] = quantize_one(tensor)
        stem = name.removesuffix("weight")
        tensors |= {f"{stem}{role}": t.contiguous() for role, t in stored.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if settings_file:
        (folder / settings_file).write_text(json.dumps(settings))
        return values
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return values


def awq(group_size: int = 32) -> tuple[dict[str, Any], Quantize]:
    """Settings and quantizer of an AutoAWQ checkpoint."""

    def one(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        codes = quantize(weight, 4, group_size, symmetric=False, scale_dtype=torch.float16)
        return awq_tensors(codes), codes.values

    settings = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True,
                "version": "gemm", "modules_to_not_convert": None}  # fmt: skip
    return settings, one


def gptq(
    bits: int = 4, group_size: int = 32, *, symmetric: bool = True, is_v2: bool = False,
    act_order_seed: int | None = None, scale_dtype: torch.dtype = torch.float16,
) -> tuple[dict[str, Any], Quantize]:  # fmt: skip
    """Settings and quantizer of a GPTQ checkpoint."""

    def one(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        codes = quantize(
            weight, bits, group_size, symmetric=symmetric, scale_dtype=scale_dtype,
            act_order_seed=act_order_seed,
        )  # fmt: skip
        return gptq_tensors(codes, bits, is_v2=is_v2), codes.values

    settings = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": symmetric,
                "desc_act": act_order_seed is not None}  # fmt: skip
    return settings | ({"checkpoint_format": "gptq_v2"} if is_v2 else {}), one


def compressed_packed(
    bits: int = 4, group_size: int = 32, *, symmetric: bool = True,
    scale_dtype: torch.dtype = torch.bfloat16, act_order_seed: int | None = None,
) -> tuple[dict[str, Any], Quantize]:  # fmt: skip
    """Settings and quantizer of a pack-quantized checkpoint."""

    def one(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        codes = quantize(
            weight, bits, group_size, symmetric=symmetric, scale_dtype=scale_dtype,
            act_order_seed=act_order_seed,
        )  # fmt: skip
        return packed_tensors(codes, bits, symmetric=symmetric), codes.values

    strategy = "channel" if group_size == -1 else "group"
    return compressed_settings(
        "pack-quantized", bits, symmetric=symmetric, strategy=strategy,
        group_size=None if group_size == -1 else group_size,
    ), one  # fmt: skip


def compressed_bytes(
    dtype: torch.dtype, *, per_tensor: bool = False, is_static: bool = False,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> tuple[dict[str, Any], Quantize]:  # fmt: skip
    """Settings and quantizer of an FP8 or INT8 checkpoint."""
    limit = 448.0 if dtype == torch.float8_e4m3fn else 127.0

    def one(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        largest = weight.float().abs()
        high = largest.amax().reshape(1) if per_tensor else largest.amax(1, keepdim=True)
        scale = (high / limit).to(scale_dtype)
        scaled = (weight.float() / scale.float()).clamp(-limit, limit)
        stored = (scaled.round() if dtype == torch.int8 else scaled).to(dtype)
        tensors = {"weight": stored, "weight_scale": scale}
        if is_static:
            tensors["input_scale"] = torch.tensor([0.02], dtype=scale_dtype)
        return tensors, stored.float() * scale.float()

    form = "float-quantized" if dtype == torch.float8_e4m3fn else "int-quantized"
    kind = "float" if dtype == torch.float8_e4m3fn else "int"
    strategy = "tensor" if per_tensor else "channel"
    return compressed_settings(form, 8, type=kind, strategy=strategy), one


def edit_settings(folder: Path, **fields: Any) -> None:
    """Sets fields of config.json's quantization_config."""
    config = json.loads((folder / "config.json").read_text())
    edit_config(folder, quantization_config={**config["quantization_config"], **fields})


def to_floats(tensors: dict[str, torch.Tensor], stem: str, one: Quantize) -> None:
    """Stores what `one` quantized under `stem` as floats, all zero."""
    shape = (tensors[f"{stem}.scales"].shape[1], tensors[f"{stem}.qweight"].shape[0])
    for role in one(torch.ones(8, 32))[0]:
        del tensors[f"{stem}.{role}"]
    tensors[f"{stem}.weight"] = torch.zeros(shape, dtype=torch.float16)
