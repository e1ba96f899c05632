"""What this machine has: its GPUs, through the driver's own library, and installed packages."""

import ctypes
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@dataclass(frozen=True, slots=True)
class Gpu:
    """One NVIDIA device. `arch` is what `millrace build --arch` calls it."""

    name: str
    arch: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Driver:
    """The NVIDIA driver: the newest CUDA version that it speaks, and its devices."""

    cuda_version: str
    gpus: tuple[Gpu, ...]


def nvidia_driver() -> Driver | str:
    """The driver, or why there is none, in a few words."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver (libcuda.so.1 is not found)"
    if code := cuda.cuInit(0):
        return f"the driver does not start (cuInit gives {code})"
    version, count = ctypes.c_int(), ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    cuda.cuDeviceGetCount(ctypes.byref(count))
    gpus = tuple(_gpu(cuda, index) for index in range(count.value))
    return Driver(f"{version.value // 1000}.{version.value % 1000 // 10}", gpus)


def _gpu(cuda: ctypes.CDLL, index: int) -> Gpu:
    device, name = ctypes.c_int(), ctypes.create_string_buffer(128)
    memory, major, minor = ctypes.c_size_t(), ctypes.c_int(), ctypes.c_int()
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    arch = f"sm_{major.value}{minor.value}"
    return Gpu(name.value.decode(errors="replace"), arch, memory.value)


def local_arch() -> str:
    """The arch of this machine's first GPU, or `cpu`."""
    driver = nvidia_driver()
    return driver.gpus[0].arch if isinstance(driver, Driver) and driver.gpus else "cpu"


def package_version(name: str) -> str | None:
    """The installed version of a distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def torch_cuda_version() -> str | None:
    """The CUDA version that the installed torch is built for, without importing torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    text = (Path(spec.submodule_search_locations[0]) / "version.py").read_text()
    names: dict[str, object] = {}
    exec(compile(text, "torch/version.py", "exec"), names)
    cuda = names.get("cuda")
    return str(cuda) if cuda else None
