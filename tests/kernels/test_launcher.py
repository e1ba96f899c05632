"""What the launcher decides without a device."""

import dataclasses
import json

import pytest

from kernels import launcher
from kernels.launcher import Device, KernelLibrary, check_device
from kernels.variant import KernelVariant
from shared.arch import ARCHES
from shared.errors import ArchMismatch, DriverTooOld, KernelMissing


def device(
    capability: tuple[int, int], driver: tuple[int, int] = (13, 0), max_shared_bytes: int = 232_448
) -> Device:
    return Device(capability, driver, max_shared_bytes)


@pytest.mark.parametrize(
    ("arch", "capability"),
    [("sm_90", (9, 0)), ("sm_80", (8, 0)), ("sm_80", (8, 6)), ("sm_80", (9, 0)), ("sm_86", (8, 9)),
     ("sm_120", (12, 0)), ("sm_80", (12, 1)), ("sm_89", (10, 3))],
)  # fmt: skip
def test_engine_runs_on_its_device_and_portable_ones_on_later_devices(
    arch: str, capability: tuple[int, int]
) -> None:
    check_device(ARCHES[arch], device(capability))


@pytest.mark.parametrize(
    ("arch", "capability", "fitting"),
    [("sm_90", (8, 0), "sm_80"), ("sm_90", (10, 0), "sm_100"), ("sm_89", (8, 6), "sm_86"),
     ("cpu", (9, 0), "sm_90"), ("sm_100", (12, 0), "sm_120"), ("sm_90", (12, 1), "sm_89"),
     ("sm_90", (8, 7), "sm_86"), ("sm_90", (7, 5), "cpu")],
)  # fmt: skip
def test_mismatch_names_both_and_the_command_that_fixes_it(
    arch: str, capability: tuple[int, int], fitting: str
) -> None:
    with pytest.raises(ArchMismatch) as caught:
        check_device(ARCHES[arch], device(capability))
    assert caught.value.fields["built_for"] == arch
    assert caught.value.fields["found"] == f"sm_{capability[0]}{capability[1]}"
    assert caught.value.fields["command"].endswith(f"--arch {fitting}")


def test_code_that_takes_more_shared_memory_than_the_device_has_is_a_mismatch() -> None:
    """sm_80 has 64 KiB more than the later revisions that its machine code runs on."""
    small = device((8, 6), max_shared_bytes=101_376)
    check_device(ARCHES["sm_80"], small, 101_376)
    with pytest.raises(ArchMismatch, match="--arch sm_86"):
        check_device(ARCHES["sm_80"], small, 104_448)
    with pytest.raises(ArchMismatch, match="--arch sm_89"):
        check_device(ARCHES["sm_80"], device((12, 1), max_shared_bytes=101_376), 104_448)


def test_old_driver_is_refused_with_both_versions() -> None:
    row = dataclasses.replace(ARCHES["sm_90"], min_driver=(12, 4))
    check_device(row, device((9, 0), driver=(12, 4)))
    with pytest.raises(DriverTooOld) as caught:
        check_device(row, device((9, 0), driver=(12, 3)))
    assert caught.value.fields == {"needed": "12.4", "found": "12.3"}


def test_ptx_needs_a_driver_that_reads_it_where_machine_code_does_not() -> None:
    check_device(ARCHES["sm_80"], device((8, 9), driver=(12, 0)))
    check_device(ARCHES["sm_80"], device((9, 0), driver=(12, 8)))
    with pytest.raises(DriverTooOld) as caught:
        check_device(ARCHES["sm_80"], device((9, 0), driver=(12, 7)))
    assert caught.value.fields == {"needed": "12.8", "found": "12.7"}


class _Driver:
    """One that no kernel is loaded by."""

    def capability(self) -> tuple[int, int]:
        return 9, 0

    def version(self) -> tuple[int, int]:
        return 13, 0

    def max_shared_bytes(self) -> int:
        return 232_448


def _library(kernels: dict[str, object]) -> KernelLibrary:
    index = json.dumps({"arch": "sm_90", "min_driver": [12, 0], "kernels": kernels})
    return KernelLibrary(index.encode(), lambda offset, size: b"")


def test_engine_of_another_version_is_told_by_the_kernel_that_it_lacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It lacks a variant, or says less of those that it has."""
    monkeypatch.setattr(launcher, "Driver", _Driver)
    record: dict[str, object] = {
        "symbol": "f", "arguments": [], "num_warps": 4, "shared_bytes": 0, "has_pdl": False,
        "code": [0, 8], "ptx": [0, 0],
    }  # fmt: skip
    variant = KernelVariant("linear", "linear_many", (), ())
    assert variant in _library({variant.key: record})
    with pytest.raises(KernelMissing, match=r"no kernel linear\.linear_many .* rebuild"):
        _library({"linear.linear_one.0123": record}).kernel(variant)
    del record["ptx"]
    with pytest.raises(KernelMissing, match=r"no kernel linear\.linear_many"):
        _library({variant.key: record})
