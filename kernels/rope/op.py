"""`rope`: rotary position embedding of each head, the half-rotation form of Hugging Face.

    a[t, i] = positions[t] * inv_freq[i],  i < D/2
    c = cos(a) * attention_scaling,  s = sin(a) * attention_scaling
    y[t, h, i]       = x[t, h, i] * c - x[t, h, i + D/2] * s
    y[t, h, i + D/2] = x[t, h, i + D/2] * c + x[t, h, i] * s

Attributes: head_dim, inv_freq (D/2 values; every way to scale a context is folded into them by the
compiler), attention_scaling.
Source: Su et al. 2021, "RoFormer", section 3.4.2; pairs (i, i + D/2) as in GPT-NeoX.
"""

from collections.abc import Mapping, Sequence

import torch

from kernels.batch import StepBatch
from kernels.op import Op, integer, number, numbers, require_inputs, widened
from shared.ir import Node, TensorSpec, WeightSpec


def infer(
    node: Node, inputs: tuple[TensorSpec, ...], weights: Mapping[str, WeightSpec]
) -> tuple[TensorSpec, ...]:
    """x [T, H*D] -> same."""
    require_inputs(inputs, 1)
    require_rope(node)
    width, head_dim = inputs[0].dims[-1], integer(node, "head_dim")
    assert isinstance(width, int), "the row's length is unknown"
    assert width % head_dim == 0, f"heads of {head_dim} do not divide rows of {width}"
    return (inputs[0],)


def reference(
    node: Node,
    inputs: Sequence[torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    batch: StepBatch,
) -> tuple[torch.Tensor, ...]:
    """The formula."""
    return (rotated(node, inputs[0], batch.positions_T),)


def require_rope(node: Node) -> None:
    """Asserts that a node's attributes describe a rotation."""
    head_dim = integer(node, "head_dim")
    count = len(numbers(node, "inv_freq"))
    assert count * 2 == head_dim, f"{count} frequencies for heads of {head_dim}"
    number(node, "attention_scaling")


def rotated(node: Node, x_TN: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
    """Each head of `x_TN` rotated to its token's position; angles are taken in fp64."""
    inv_freq = torch.tensor(numbers(node, "inv_freq"), dtype=torch.float64, device=x_TN.device)
    angles_TI = positions_T.double()[:, None] * inv_freq
    wide = widened(x_TN).reshape(len(x_TN), -1, integer(node, "head_dim"))
    scaling = number(node, "attention_scaling")
    cos = (angles_TI.cos() * scaling).to(wide.dtype)[:, None]
    sin = (angles_TI.sin() * scaling).to(wide.dtype)[:, None]
    first, second = wide.chunk(2, -1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return turned.flatten(-2).to(x_TN.dtype)


ROPE = Op("rope", infer, reference)
