"""The pieces that CPU kernels are written with."""

import math
import subprocess
import sys

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


def test_every_nan_stays_one_in_bf16() -> None:
    bits = torch.tensor([0x7FFFFFFF, 0x7F800001, 0x7FC00000, -1, -0x7FFFFF], dtype=torch.int32)
    assert copied(bits.view(torch.float32), torch.bfloat16).isnan().all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_codes_of_8_bits_are_rounded_as_torch_rounds_them(dtype: torch.dtype) -> None:
    """To nearest, ties to even, for values that are just below, at and just above every number that may tie."""
    codes = torch.arange(0, 127).to(torch.uint8).view(torch.float8_e4m3fn).float()  # to 448
    if dtype == torch.int8:
        codes = torch.arange(0, 128).float()
    ties = (codes[1:] + codes[:-1]) / 2
    x = torch.cat((codes, ties, ties.nextafter(ties * 0), ties.nextafter(ties * 2)))
    x = torch.cat((x, -x))
    expected = x.round().to(dtype) if dtype == torch.int8 else x.to(dtype)
    assert torch.equal(copied(x, dtype).view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_loading_widens_exactly(dtype: torch.dtype) -> None:
    x = torch.arange(-128, 128, dtype=torch.float32).to(dtype)
    assert torch.equal(copied(x, torch.float32), x.float())


def test_exp_is_right_to_four_parts_in_ten_million() -> None:
    x = torch.linspace(-87, 88, 100_003)
    out = torch.empty_like(x)
    _exponentials(x.data_ptr(), out.data_ptr(), len(x), TAGS[torch.float32])
    exact = x.double().exp()
    assert float(((out.double() - exact).abs() / exact).max()) < 4e-7


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


def test_torch_and_numba_share_one_pool_of_threads() -> None:
    """torch and Numba on OpenMP libraries of their own would spin against each other."""
    program = (
        "from shared.process import share_openmp; share_openmp()\n"
        "import torch\n"
        "from kernels.rms_norm.cpu_kernel import rms_norm\n"
        "from kernels.cpu_jit import TAGS\n"
        "x = torch.ones(4, 8); tag = TAGS[torch.float32]\n"
        "rms_norm(x.data_ptr(), x.data_ptr(), x.data_ptr(), 4, 8, 1e-5, tag, tag)\n"
        "import numba; print(numba.threading_layer())\n"
        "print(len({line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line}))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    layer, num_libraries = ran.stdout.split()
    if layer != "omp":
        pytest.skip("no OpenMP library is installed")
    assert num_libraries == "1"
