"""Which arch this machine runs: asked of the CUDA driver itself, without torch and its start-up."""

import ctypes

from shared.arch import ARCHES, Arch
from shared.errors import ArchMismatch

_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 75, 76


def own_arch() -> str:
    """The arch that engines for this machine have: its first GPU's, or `cpu` where there is none.

    Raises:
        ArchMismatch: there is a GPU, and no arch is for it.
    """
    capability = gpu_capability()
    return "cpu" if capability is None else arch_of(capability).name


def arch_of(capability: tuple[int, int]) -> Arch:
    """The best arch whose machine code runs on a device of this compute capability.

    Raises:
        ArchMismatch: there is none.
    """
    major, minor = capability
    fitting = [
        arch
        for arch in ARCHES.values()
        if arch.capability is not None
        and (
            arch.capability == capability
            or (arch.is_portable and arch.capability[0] == major and arch.capability[1] <= minor)
        )
    ]
    if not fitting:
        raise ArchMismatch(
            built_for=", ".join(a.name for a in ARCHES.values() if a.is_gpu),
            found=f"sm_{major}{minor}",
            command="millrace-runtime --arch cpu",
        )
    return max(fitting, key=lambda arch: arch.capability or (0, 0))


def gpu_capability() -> tuple[int, int] | None:
    """Compute capability of the first CUDA device; None without a driver or a device."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:  # no driver on this machine
        return None
    device, count = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or count.value == 0:
        return None
    if driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    values = []
    for attribute in (_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR):
        value = ctypes.c_int()
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
        values.append(value.value)
    return values[0], values[1]
