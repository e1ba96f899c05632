"""`int4-awq`: channels that see large activations are scaled up before rounding, and so lose less.

    s[k] = mean |x[k]| ** a;   w'[n, k] = w[n, k] s[k];   x'[k] = x[k] / s[k]

The exponent a is sought for each linear on a grid: the one with the least error of the output on
the calibration text, s = 1 among them. Then each group's range is clipped where that lowers its
error, weighted by the mean square of the inputs. The layout, and so the speed, is that of
`int4-rtn`: the division rides on what makes the input (rescale.py).

Legend: T tokens, K in, N out.
Source: Lin et al. 2023, "AWQ: Activation-aware Weight Quantization", sections 3.2 and 4.
"""

from dataclasses import replace

import torch

from compiler_service.quantization.int4_rtn import INT4_RTN
from compiler_service.quantization.rescale import ScaleSource, choose_scales, exact_for_gain
from compiler_service.quantization.scheme import InputScale, Pack
from compiler_service.streaming import RowsOf, row_chunks
from kernels.linear.layouts import NO_CLIP, int4_grid, int4_levels, pack_int4
from shared.ir import WeightSpec

_EXPONENTS = tuple(step / 10 for step in range(11))
# Of the calibration's tokens, so many decide between exponents.
_SAMPLED_TOKENS = 128
_LEAST = 1e-4


def choose_scale(
    spec: WeightSpec,
    rows_of: RowsOf,
    x_TK: torch.Tensor,
    source: ScaleSource | None,
    gain_K: torch.Tensor | None,
) -> InputScale:
    """The scale for one linear's input where it can have one, and its channels' importance."""
    scale_K = None
    if source is not None:
        magnitude_K = source.shared(x_TK.abs().mean(0))
        scale_K = _best_scale(spec, rows_of, x_TK, magnitude_K, gain_K)
    mean_square_K = x_TK.square().mean(0)
    if scale_K is not None:
        mean_square_K = mean_square_K / scale_K.square()
    return InputScale(scale_K, mean_square_K)


def _best_scale(
    spec: WeightSpec,
    rows_of: RowsOf,
    x_TK: torch.Tensor,
    magnitude_K: torch.Tensor,
    gain_K: torch.Tensor | None,
) -> torch.Tensor | None:
    """The scale of the exponent that costs least on the sampled inputs; None where 1 does."""
    if not float(magnitude_K.max()):
        return None
    scales = []
    for exponent in _EXPONENTS[1:]:
        scale_K = magnitude_K.clamp(min=_LEAST * float(magnitude_K.max())).pow(exponent)
        scale_K = scale_K / (scale_K.max() * scale_K.min()).sqrt()
        scales.append(scale_K if gain_K is None else exact_for_gain(scale_K, gain_K))
    x_TK = x_TK[:: max(len(x_TK) // _SAMPLED_TOKENS, 1)]
    num_rows, num_columns = spec.shape
    groups = (num_columns // spec.group_size, spec.group_size)
    losses = torch.zeros(1 + len(scales), dtype=torch.float64)
    for rows in row_chunks(num_rows, num_columns):
        weight_NK = rows_of(rows)
        for index, scale in enumerate([None, *scales]):
            scaled_NK = weight_NK if scale is None else weight_NK * scale
            groups_NJG = scaled_NK.view(-1, *groups)
            step, zero = (t[..., None] for t in int4_grid(groups_NJG, clips=NO_CLIP))
            rounded_NJG = int4_levels(groups_NJG, step, zero).mul_(step).add_(zero)
            error_NK = rounded_NJG.sub_(groups_NJG).flatten(1)
            if scale is not None:
                error_NK = error_NK.div_(scale)
            losses[index] += float(torch.linalg.vector_norm(x_TK @ error_NK.T)) ** 2
    best = int(losses.argmin())
    return None if best == 0 else scales[best - 1]


def prepare_pack(
    group_size: int, inputs_TK: torch.Tensor | None, importance_K: torch.Tensor | None
) -> Pack:
    """Rounds to nearest, each group's range chosen by what its channels cost."""
    return lambda weight_NK: pack_int4(weight_NK, group_size, importance_K)


INT4_AWQ = replace(
    INT4_RTN, name="int4-awq", calibrate=choose_scales(choose_scale), prepare_pack=prepare_pack
)
