"""`w8a8-int8`: weights and activations in 8 bits, multiplied as integers. A few activation channels
are far larger than the rest and would leave those a few levels; part of that is moved to the
weights first, which round well.

    s[k] = sqrt(max |x[k]| / max_n |w[n, k]|);   w'[n, k] = w[n, k] s[k];   x'[k] = x[k] / s[k]

Scales of tokens are found as they come. The head multiplies what it is given: its logits are what
people see.

Legend: K in, N out.
Source: Xiao et al. 2022, "SmoothQuant", section 4, equation 4 with a migration strength of 0.5.
"""

from dataclasses import replace

import torch

from compiler_service.quantization.int8 import INT8
from compiler_service.quantization.rescale import ScaleSource, choose_scales, exact_for_gain
from compiler_service.quantization.scheme import EIGHT_BIT_INPUTS, InputScale
from compiler_service.streaming import RowsOf, row_chunks
from shared.ir import WeightSpec

_LEAST = 1e-5


def choose_scale(
    spec: WeightSpec,
    rows_of: RowsOf,
    x_TK: torch.Tensor,
    source: ScaleSource | None,
    gain_K: torch.Tensor | None,
) -> InputScale:
    """The scale that shares a channel's range between input and weight, where there can be one."""
    if source is None:
        return InputScale(None, None)
    largest_K = torch.zeros(spec.shape[1])
    for rows in row_chunks(*spec.shape):
        largest_K = torch.maximum(largest_K, rows_of(rows).abs().amax(0))
    active_K = source.shared(x_TK.abs().amax(0)).clamp(min=_LEAST)
    scale_K = (active_K / source.shared(largest_K).clamp(min=_LEAST)).sqrt()
    scale_K = scale_K / (scale_K.max() * scale_K.min()).sqrt()
    return InputScale(scale_K if gain_K is None else exact_for_gain(scale_K, gain_K), None)


W8A8_INT8 = replace(
    INT8,
    name="w8a8-int8",
    limits=EIGHT_BIT_INPUTS,
    calibrate=choose_scales(choose_scale),
    activations="int8",
)
