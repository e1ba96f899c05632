"""Rounding to nearest beside libraries that people trust, on the same weights.

    pip install torchao==0.18.0 compressed-tensors==0.20.0
    python -m bench.quant_peers [--model sample:smollm2-135m] [--layers 0,15,29]

Two questions of every linear of some layers, a line of JSON for each layout and library:

    error      how far each library's own rounding is from the weight, relative (Frobenius norms), and ours
    decoding   the largest difference where both decode the same codes, scales and zeros: ours

int8 and fp8 (e4m3): a scale for each channel, symmetric. int4: groups of 64, with a zero for each.
llm-compressor stores and reads its weights by compressed-tensors, which is asked here.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial

import torch

from bench.peer_libraries import peer_libraries
from compiler_service.checkpoints.sources import open_checkpoint
from kernels.linear.layouts import LAYOUTS

with peer_libraries("torchao==0.18.0", "compressed-tensors==0.20.0"):
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
    from compressed_tensors.quantization.utils import calculate_qparams
    from torchao.quantization.quant_primitives import (
        MappingType,
        _choose_scale_float8,
        _dequantize_affine_float8,
        _quantize_affine_float8,
        choose_qparams_affine,
        dequantize_affine,
        quantize_affine,
    )

GROUP = 64
Rounding = Callable[[torch.Tensor], torch.Tensor]
Decoding = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def torchao_round(bits: int, group: int) -> Rounding:
    """torchao's rounding to nearest: symmetric for 8 bits, with zeros for 4."""
    mapping = MappingType.SYMMETRIC if bits == 8 else MappingType.ASYMMETRIC
    low, high = (-127, 127) if bits == 8 else (0, 15)
    dtype = torch.int8 if bits == 8 else torch.uint8

    def rounded(weight_NK: torch.Tensor) -> torch.Tensor:
        block = (1, group or weight_NK.shape[1])
        scale, zero = choose_qparams_affine(weight_NK, mapping, block, dtype, low, high)
        codes = quantize_affine(weight_NK, block, scale, zero, dtype, low, high)
        return dequantize_affine(codes, block, scale, zero, dtype, low, high)

    return rounded


def torchao_round_fp8(weight_NK: torch.Tensor) -> torch.Tensor:
    """torchao's rounding to e4m3."""
    scale_NJ = _choose_scale_float8(weight_NK, [1, weight_NK.shape[1]])
    return _dequantize_affine_float8(_quantize_affine_float8(weight_NK, scale_NJ), scale_NJ)


def compressed_round(args: QuantizationArgs, group: int) -> Rounding:
    """compressed-tensors' rounding to nearest, by the same rules."""

    def rounded(weight_NK: torch.Tensor) -> torch.Tensor:
        rows_NJG = weight_NK.reshape(len(weight_NK), -1, group or weight_NK.shape[1])
        scale, zero = calculate_qparams(rows_NJG.amin(-1), rows_NJG.amax(-1), args)
        return dequantize(quantize(weight_NK, scale, zero, args), scale, zero, args)

    return rounded


def fp8_decodings(packed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What each library makes of our e4m3 codes and scales."""
    codes_NK, scale_NJ = packed["weight"], packed["scale"][:, None]
    return {
        "torchao": _dequantize_affine_float8(codes_NK, scale_NJ),
        "compressed-tensors": dequantize(codes_NK, scale_NJ, None, _fp8_args()),
    }


def int_decodings(bits: int, packed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What each library makes of our codes and scales; both know integer zeros alone, so that ours,
    which are values, are added to what they give."""
    if bits == 8:
        codes_NK, scale_NJ, zero_NK = packed["weight"], packed["scale"][:, None], 0.0
        group, low, high = codes_NK.shape[1], -127, 127
    else:
        codes_NK = torch.stack((packed["weight"] & 15, packed["weight"] >> 4), -1).flatten(1)
        codes_NK = codes_NK.to(torch.int8) - 8
        scale_NJ, group, low, high = packed["scale"], GROUP, -8, 7
        zero_NK = packed["zero"].repeat_interleave(GROUP, 1)
    none = torch.zeros_like(scale_NJ, dtype=torch.int32)
    args = _args(bits, GROUP if bits == 4 else 0, symmetric=True)
    return {
        "torchao": dequantize_affine(codes_NK, (1, group), scale_NJ, none, torch.int8, low, high)
        + zero_NK,
        "compressed-tensors": dequantize(codes_NK, scale_NJ, none, args) + zero_NK,
    }


def _args(bits: int, group: int, symmetric: bool | None = None) -> QuantizationArgs:
    return QuantizationArgs(
        num_bits=bits,
        type="int",
        symmetric=bits == 8 if symmetric is None else symmetric,
        strategy="group" if group else "channel",
        group_size=group or None,
    )


def _fp8_args() -> QuantizationArgs:
    return QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="channel")


def _relative(found: torch.Tensor, weight: torch.Tensor) -> float:
    return float((found - weight).norm() / weight.norm())


def main() -> None:
    """Compares, and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="sample:smollm2-135m")
    parser.add_argument("--layers", default="0,15,29")
    options = parser.parse_args()
    checkpoint = open_checkpoint(options.model)
    parts = tuple(f".layers.{layer}." for layer in options.layers.split(","))
    names = [
        name
        for name, info in checkpoint.tensors.items()
        if len(info.shape) == 2 and any(part in name for part in parts)
    ]
    comparisons: tuple[tuple[str, int, dict[str, Rounding], Decoding], ...] = (
        (
            "int8_channel",
            0,
            {
                "torchao": torchao_round(8, 0),
                "compressed-tensors": compressed_round(_args(8, 0), 0),
            },
            partial(int_decodings, 8),
        ),
        (
            "int4_group",
            GROUP,
            {
                "torchao": torchao_round(4, GROUP),
                "compressed-tensors": compressed_round(_args(4, GROUP), GROUP),
            },
            partial(int_decodings, 4),
        ),
        (
            "fp8_channel",
            0,
            {"torchao": torchao_round_fp8, "compressed-tensors": compressed_round(_fp8_args(), 0)},
            fp8_decodings,
        ),
    )
    for layout, group, rounding, decodings in comparisons:
        for library, rounded in rounding.items():
            ours, theirs, decoding = [], [], 0.0
            for name in names:
                weight_NK = checkpoint.read(name).float()
                packed = LAYOUTS[layout].pack(weight_NK, group)
                unpacked_NK = LAYOUTS[layout].unpack(packed)
                ours.append(_relative(unpacked_NK, weight_NK))
                theirs.append(_relative(rounded(weight_NK), weight_NK))
                difference = (decodings(packed)[library] - unpacked_NK).abs().max()
                decoding = max(decoding, float(difference))
            result = {
                "layout": layout,
                "library": library,
                "num_weights": len(names),
                "error_ours": round(sum(ours) / len(ours), 6),
                "error_theirs": round(sum(theirs) / len(theirs), 6),
                "num_ours_is_worse": sum(o > t for o, t in zip(ours, theirs, strict=True)),
                "largest_decoding_difference": decoding,
            }
            print(json.dumps(result))


if __name__ == "__main__":
    main()
