"""What the launcher decides without a device."""

import dataclasses

import pytest

from kernels.launcher import check_device
from shared.arch import ARCHES
from shared.errors import ArchMismatch, DriverTooOld


@pytest.mark.parametrize(
    ("arch", "capability"),
    [("sm_90", (9, 0)), ("sm_80", (8, 0)), ("sm_80", (8, 6)), ("sm_80", (9, 0)), ("sm_86", (8, 9)),
     ("sm_120", (12, 0)), ("sm_80", (12, 1))],
)  # fmt: skip
def test_engine_runs_on_its_device_and_portable_ones_on_later_devices(
    arch: str, capability: tuple[int, int]
) -> None:
    check_device(ARCHES[arch], capability, (13, 0))


@pytest.mark.parametrize(
    ("arch", "capability", "fitting"),
    [("sm_90", (8, 0), "sm_80"), ("sm_90", (10, 0), "sm_100"), ("sm_89", (8, 6), "sm_86"),
     ("cpu", (9, 0), "sm_90"), ("sm_100", (12, 0), "sm_120"), ("sm_90", (12, 1), "sm_80")],
)  # fmt: skip
def test_mismatch_names_both_and_the_command_that_fixes_it(
    arch: str, capability: tuple[int, int], fitting: str
) -> None:
    with pytest.raises(ArchMismatch) as caught:
        check_device(ARCHES[arch], capability, (13, 0))
    assert caught.value.fields["built_for"] == arch
    assert caught.value.fields["found"] == f"sm_{capability[0]}{capability[1]}"
    assert caught.value.fields["command"].endswith(f"--arch {fitting}")


def test_old_driver_is_refused_with_both_versions() -> None:
    row = dataclasses.replace(ARCHES["sm_90"], min_driver=(12, 4))
    check_device(row, (9, 0), (12, 4))
    with pytest.raises(DriverTooOld) as caught:
        check_device(row, (9, 0), (12, 3))
    assert caught.value.fields == {"needed": "12.4", "found": "12.3"}
