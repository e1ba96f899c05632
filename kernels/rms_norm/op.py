"""`rms_norm`: rows scaled to unit root mean square, then by a weight; maybe after a residual add.

    s = x + residual              (where attribute `residual`; s is the second output)
    y = s / sqrt(mean(s^2) + eps) * weight

The mean runs over the whole row, or over each slice of `head_dim` values where that is not 0.
Weight: [M], or [D] with head_dim. Attributes: eps, residual, head_dim.
Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.
"""

from collections.abc import Mapping, Sequence

import torch

from kernels.batch import StepBatch
from kernels.op import Op, integer, number, require_inputs, require_last, widened
from shared.ir import Node, TensorSpec, WeightSpec


def infer(
    node: Node, inputs: tuple[TensorSpec, ...], weights: Mapping[str, WeightSpec]
) -> tuple[TensorSpec, ...]:
    """x -> y; or (x, residual) -> (y, x + residual)."""
    has_residual, head_dim = bool(node.attrs["residual"]), integer(node, "head_dim")
    require_inputs(inputs, 2 if has_residual else 1)
    number(node, "eps")
    size = inputs[0].dims[-1]
    assert isinstance(size, int), "the row's length is unknown"
    assert not (has_residual and head_dim), "a norm over heads takes no residual"
    if head_dim:
        assert size % head_dim == 0, f"heads of {head_dim} do not divide rows of {size}"
    assert weights["weight"].shape == (head_dim or size,), (
        f"weight has shape {weights['weight'].shape}, not {(head_dim or size,)}"
    )
    if has_residual:
        require_last(inputs[1], size, "the residual")
        return inputs[0], inputs[0]
    return (inputs[0],)


def reference(
    node: Node,
    inputs: Sequence[torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    batch: StepBatch,
) -> tuple[torch.Tensor, ...]:
    """The formula; the sum is rounded to the operands' dtype before it is normed."""
    eps, head_dim = number(node, "eps"), integer(node, "head_dim")
    if not node.attrs["residual"]:
        return (normed(inputs[0], weights["weight"], eps, head_dim),)
    total = (widened(inputs[0]) + widened(inputs[1])).to(inputs[0].dtype)
    return normed(total, weights["weight"], eps), total


def normed(x: torch.Tensor, weight: torch.Tensor, eps: float, head_dim: int = 0) -> torch.Tensor:
    """`x` normed over its last dim, or over each slice of `head_dim` values."""
    wide = widened(x).reshape(*x.shape[:-1], -1, head_dim or x.shape[-1])
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    result = wide * scale * weight.to(wide.dtype)
    return result.reshape(x.shape).to(x.dtype)


RMS_NORM = Op("rms_norm", infer, reference, is_row_wise=True)
