"""The pieces that CPU kernels are written with."""

import math

import numpy as np
import pytest
import torch
from numba import prange

from kernels.cpu_jit import TAGS, address, exp, kernel, load, store, typed


@kernel
def _copied(x_at, out_at, size, x_tag, out_tag):  # type: ignore[no-untyped-def]
    for i in prange(size):
        store(typed(out_at, out_tag), i, load(typed(x_at, x_tag), i))


@kernel
def _exponentials(x_at, out_at, size, tag):  # type: ignore[no-untyped-def]
    for i in prange(size):
        store(typed(out_at, tag), i, exp(load(typed(x_at, tag), i)))


def copied(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(len(x), dtype=dtype)
    _copied(x.data_ptr(), out.data_ptr(), len(x), TAGS[x.dtype], TAGS[dtype])
    return out


def test_bf16_is_rounded_as_torch_rounds_it() -> None:
    """To nearest, ties to even; infinities stay."""
    bits = torch.arange(0, 1 << 16, dtype=torch.int32) << 13  # ties, and a quarter to both sides
    x = torch.cat((bits.view(torch.float32), -bits.view(torch.float32), torch.tensor([math.inf])))
    x = x[~x.isnan()]
    assert torch.equal(copied(x, torch.bfloat16), x.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_loading_widens_exactly(dtype: torch.dtype) -> None:
    x = torch.arange(-128, 128, dtype=torch.float32).to(dtype)
    assert torch.equal(copied(x, torch.float32), x.float())


def test_exp_is_right_to_two_units_in_the_last_place() -> None:
    x = torch.linspace(-87, 88, 100_003)
    out = torch.empty_like(x)
    _exponentials(x.data_ptr(), out.data_ptr(), len(x), TAGS[torch.float32])
    exact = x.double().exp()
    assert float(((out.double() - exact).abs() / exact).max()) < 4 * np.finfo(np.float32).eps


def test_exp_keeps_nan_and_ends_at_its_range() -> None:
    x = torch.tensor([math.nan, -math.inf, -1e9, 1e9])
    out = torch.empty_like(x)
    _exponentials(x.data_ptr(), out.data_ptr(), len(x), TAGS[torch.float32])
    assert out[0].isnan()
    assert 0 <= out[1] < 1e-37
    assert 0 <= out[2] < 1e-37
    assert 1e38 < out[3] < math.inf


def test_address_refuses_what_a_kernel_would_misread() -> None:
    with pytest.raises(AssertionError, match=r"not torch\.float32"):
        address(torch.zeros(2), torch.bfloat16)
    with pytest.raises(AssertionError, match="dense"):
        address(torch.zeros(2, 2).t(), torch.float32)
