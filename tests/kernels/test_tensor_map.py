"""Matrices that a launch describes to the copy engine, with a driver that writes down what it is asked for."""

import ctypes
from typing import Any, cast

import pytest

from kernels import launcher
from kernels.aot import CompiledKernel, pack_kernels
from kernels.driver import Driver
from kernels.linear.launch import LinearShape
from kernels.linear.launch_int4 import many_int4, many_int4_tiles
from kernels.variant import BOXES_PARAMETERS
from shared.arch import ARCHES

_SHAPE = LinearShape(512, 640, "bf16", "bf16", "int4_group", 64)
_ARCH = ARCHES["sm_90"]


class _Library:
    """libcuda's part that loads code."""

    def cuModuleLoadData(self, *_: object) -> int:
        return 0

    def cuModuleGetFunction(self, *_: object) -> int:
        return 0

    def cuFuncSetAttribute(self, *_: object) -> int:
        return 0


class _Driver:
    """Maps are numbered, and hold their number."""

    def __init__(self) -> None:
        self.library = _Library()
        self.launched: list[list[bytes]] = []
        self.described: list[tuple[int, tuple[int, int], int, tuple[int, int], int]] = []

    def encode_tiled(
        self, at: int, code: int, rank: int, pointer: int, dims: Any, stride: Any, box: Any,
        steps: Any, interleave: int, swizzle: int, promotion: int, fill: int,
    ) -> int:  # fmt: skip
        assert at % 64 == 0
        assert (rank, tuple(steps), interleave, fill) == (2, (1, 1), 0, 0)
        self.described.append((pointer, tuple(dims), stride._obj.value, tuple(box), swizzle))
        ctypes.memset(at, len(self.described), 128)
        return 0

    def check(self, result: int, what: str) -> None:
        assert result == 0, what

    def launch_ex(self, config: int, function: object, pointers: int, extra: None) -> int:
        sizes = [*BOXES_PARAMETERS * 3, 8, 4, 8, 8]
        places = (ctypes.c_void_p * len(sizes)).from_address(pointers)
        self.launched.append(
            [ctypes.string_at(at or 0, n) for at, n in zip(places, sizes, strict=True)]
        )
        return 0


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> tuple[launcher.Kernel, _Driver]:
    """As read from the index that a build writes."""
    monkeypatch.setattr(launcher, "_current_stream", lambda: 0)
    variant = many_int4(_SHAPE, _ARCH, *many_int4_tiles(_SHAPE, 4096))
    compiled = CompiledKernel(variant, "f", 12, 1 << 17, b"code", b"")
    (_, index), _ = pack_kernels([compiled], _ARCH)
    driver = _Driver()
    entry = launcher.json.loads(index)["kernels"][variant.key]
    record = launcher._record(variant.key, entry)
    return launcher.Kernel(cast(Driver, driver), record, b"code"), driver


def test_a_launch_passes_maps_of_its_matrices(kernel: tuple[launcher.Kernel, _Driver]) -> None:
    launch, driver = kernel
    launch((1, 1, 1), 0x1000, 0x2000, 0x3000, 0x4000, 300)
    assert driver.described == [
        (0x1000, (640, 300), 2 * 640, (64, 256), 3),
        (0x2000, (192, 512), 2 * 192, (64, 128), 3),
        (0x3000, (4, 3 * 512), 16, (4, 128), 0),
    ]
    parameters = driver.launched[0]
    assert [parameters[at][:1] for at in (0, 5, 10)] == [b"\1", b"\2", b"\3"]
    numbers = [int.from_bytes(value, "little") for value in parameters]
    assert numbers[1:5] == [300, 640, 640, 1]
    assert numbers[6:10] == [512, 192, 192, 1]
    assert numbers[11:15] == [3 * 512, 4, 4, 1]
    assert numbers[15:] == [0x4000, 300, 0, 0]


def test_weights_are_described_once_and_x_anew(kernel: tuple[launcher.Kernel, _Driver]) -> None:
    """Layers take turns with one kernel; steps have other numbers of rows."""
    launch, driver = kernel
    for tokens in (300, 301):
        for layer in (0x2000, 0x5000):
            launch((1, 1, 1), 0x1000, layer, layer + 0x800, 0x4000, tokens)
    described = [pointer for pointer, *_ in driver.described]
    assert described.count(0x1000) == 2
    assert sorted(set(described)) == [0x1000, 0x2000, 0x2800, 0x5000, 0x5800]
    assert len(described) == 6
    first, second, third, fourth = driver.launched
    assert first[5] == third[5]
    assert second[5] == fourth[5]
    assert first[5] != second[5]
    assert int.from_bytes(third[1], "little") == 301
