"""Recorded calls of CPU kernels."""

import pytest
import torch

from kernels.cpu_jit import TAGS, recording
from kernels.cpu_program import Buffers, record
from kernels.rms_norm.cpu_kernel import rms_norm

BF16, FP32 = torch.bfloat16, torch.float32


def normed(x: torch.Tensor) -> torch.Tensor:
    """Twice, by way of a tensor of its own."""
    between, out = torch.empty_like(x), torch.empty_like(x)
    for source, target in ((x, between), (between, out)):
        rms_norm(
            source.data_ptr(), WEIGHT.data_ptr(), target.data_ptr(), len(x), x.shape[1], 1e-5,
            TAGS[x.dtype], TAGS[FP32],
        )  # fmt: skip
    return out


WEIGHT = torch.linspace(0.5, 2, 24)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("rows", [1, 5])
def test_program_computes_what_its_calls_did_from_the_values_of_now(
    dtype: torch.dtype, rows: int
) -> None:
    x = torch.randn(rows, 24).to(dtype)
    first, program = record(lambda: normed(x), Buffers())
    assert program is not None
    assert len(program) == 2
    assert torch.equal(first, normed(x))
    x.copy_(torch.randn(rows, 24))
    program.run()
    assert torch.equal(first, normed(x))


def test_programs_share_their_buffers() -> None:
    """The second's values are written where the first's were; what either gave is its own."""
    buffers = Buffers()
    inputs = torch.randn(3, 24), torch.randn(2, 24)
    recorded = [record(lambda x=x: normed(x), buffers) for x in inputs]
    outputs = [output for output, _ in recorded]
    for _, program in reversed(recorded):
        assert program is not None
        program.run()
    assert all(torch.equal(output, normed(x)) for output, x in zip(outputs, inputs, strict=True))


def test_what_torch_computes_from_values_is_in_no_program() -> None:
    x = torch.randn(1, 24)
    assert record(lambda: normed(x + 1), Buffers())[1] is None
    assert record(lambda: normed(x).sum().item(), Buffers())[1] is None
    assert record(lambda: normed(x).add_(1), Buffers())[1] is None


def test_views_and_constants_are_no_computation() -> None:
    x = torch.randn(4, 24)
    output, program = record(lambda: normed(x[1:3])[torch.arange(1).shape[0] :], Buffers())
    assert program is not None
    x.add_(1)
    program.run()
    assert torch.equal(output, normed(x[1:3])[1:])


def test_memory_is_used_again_once_a_tensor_and_its_views_are_gone() -> None:
    buffers = Buffers()
    tensor = buffers.empty((4, 8), FP32)
    place, view = tensor.data_ptr(), tensor[2:]
    del tensor
    assert buffers.empty((4, 8), FP32).data_ptr() != place
    del view
    held = buffers.empty((8, 2), BF16)
    smaller = buffers.empty((4, 8), FP32)
    assert place in (held.data_ptr(), smaller.data_ptr())
    assert held.data_ptr() != smaller.data_ptr()


def test_a_recording_ends_with_what_it_records() -> None:
    def fails() -> None:
        normed(torch.randn(1, 24))
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        record(fails, Buffers())
    assert recording.calls is None
