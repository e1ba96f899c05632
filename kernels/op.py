"""What an op is: a shape rule and a meaning. Fast forms (cpu.py, triton.py) stand beside, and are
compared with the meaning.

Legend: T packed tokens, R rows whose logits are wanted, M model dim.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from kernels.batch import StepBatch
from shared.ir import Node, TensorSpec, WeightSpec

EFFECT = TensorSpec((), "effect")


class Infer(Protocol):
    """Specs of a node's outputs; AssertionError where the node contradicts its op."""

    def __call__(
        self, node: Node, inputs: tuple[TensorSpec, ...], weights: Mapping[str, WeightSpec]
    ) -> tuple[TensorSpec, ...]: ...


class Reference(Protocol):
    """A node's outputs in plain torch, written for truth.

    Computed in fp32, or in fp64 where operands are; results in the operands' dtype. An effect's
    value is an empty tensor.
    """

    def __call__(
        self,
        node: Node,
        inputs: Sequence[torch.Tensor],
        weights: Mapping[str, torch.Tensor],
        batch: StepBatch,
    ) -> tuple[torch.Tensor, ...]: ...


@dataclass(frozen=True, slots=True)
class Op:
    """One op of the graph: its name, its shape rule, its meaning.

    Args:
        is_row_wise: a row of its outputs depends on the same row of its inputs alone.
    """

    name: str
    infer: Infer
    reference: Reference
    is_row_wise: bool = False


def widened(x: torch.Tensor) -> torch.Tensor:
    """`x` in the dtype that references compute in: fp64 stays, all else is fp32."""
    return x if x.dtype == torch.float64 else x.float()


def effect_value() -> torch.Tensor:
    """What stands for an effect among values."""
    return torch.empty(0)


def integer(node: Node, name: str) -> int:
    """The attribute `name`, which must be an int."""
    value = node.attrs.get(name)
    assert isinstance(value, int), f"{node.op} needs an integer attribute {name!r}, not {value!r}"
    return value


def number(node: Node, name: str) -> float:
    """The attribute `name`, which must be a number."""
    value = node.attrs.get(name)
    assert isinstance(value, int | float), f"{node.op} needs a number {name!r}, not {value!r}"
    return float(value)


def numbers(node: Node, name: str) -> tuple[float, ...]:
    """The attribute `name`, which must be a tuple of numbers."""
    value = node.attrs.get(name)
    assert isinstance(value, tuple), f"{node.op} needs numbers {name!r}, not {value!r}"
    return tuple(float(v) for v in value)


def require_inputs(inputs: tuple[TensorSpec, ...], count: int) -> None:
    """Asserts that a node has `count` inputs."""
    assert len(inputs) == count, f"{len(inputs)} inputs, not {count}"


def require_last(spec: TensorSpec, size: int, what: str) -> None:
    """Asserts that a value's last dim is `size`."""
    assert spec.dims, f"{what} is an effect, not a tensor"
    assert spec.dims[-1] == size, f"{what} has last dim {spec.dims[-1]}, not {size}"


def elementwise(name: str, num_inputs: int, formula: Callable[..., torch.Tensor]) -> Op:
    """The op that applies `formula` to the elements of inputs of one shape."""

    def infer(
        node: Node, inputs: tuple[TensorSpec, ...], weights: Mapping[str, WeightSpec]
    ) -> tuple[TensorSpec, ...]:
        """Inputs of one shape -> same."""
        require_inputs(inputs, num_inputs)
        for spec in inputs:
            assert spec.dims == inputs[0].dims, f"{inputs[0].dims} and {spec.dims} differ"
        return (inputs[0],)

    def reference(
        node: Node,
        inputs: Sequence[torch.Tensor],
        weights: Mapping[str, torch.Tensor],
        batch: StepBatch,
    ) -> tuple[torch.Tensor, ...]:
        """The formula."""
        return (formula(*map(widened, inputs)).to(inputs[0].dtype),)

    return Op(name, infer, reference, is_row_wise=True)
