"""Which arch this machine runs: asked of the CUDA driver itself, without torch and its start-up."""

import ctypes

from shared.arch import ARCHES, Arch, arch_for
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
    """The best arch whose engines run on a device of this compute capability.

    Raises:
        ArchMismatch: there is none.
    """
    arch = arch_for(capability)
    if arch is None:
        raise ArchMismatch(
            built_for=", ".join(a.name for a in ARCHES.values() if a.is_gpu),
            found=f"sm_{capability[0]}{capability[1]}",
            command="millrace-runtime --arch cpu",
        )
    return arch


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
