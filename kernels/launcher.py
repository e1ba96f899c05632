"""Loads an engine's machine code through the CUDA driver and launches it on torch's stream.

A serving process needs no compiler, and code may be loaded before torch is imported. A launch can be captured in a
CUDA graph. What a kernel computes and which arguments it wants is not known here.
"""

import ctypes
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kernels.driver import Driver
from kernels.tensor_map import TensorMap
from kernels.variant import DIVISIBILITY, Argument, Boxes, KernelRecord, KernelVariant
from shared.arch import Arch, arch_for, arch_named
from shared.errors import ArchMismatch, DriverTooOld, KernelMissing

Grid = tuple[int, int, int]

_MAX_DYNAMIC_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_…
_DEFAULT_SHARED_BYTES = 48 << 10
# That reads what Triton writes: PTX 8.7.
_PTX_DRIVER = (12, 8)
_FIELDS = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}


class _Attribute(ctypes.Structure):  # CUlaunchAttribute
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):  # CUlaunchConfig
    _fields_ = (
        *((name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared_bytes")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


@dataclass(frozen=True, slots=True)
class Device:
    """What machine code asks of a device.

    Args:
        capability: (major, minor).
        driver: the version of CUDA that its driver speaks, (major, minor).
        max_shared_bytes: shared memory that one thread block may use.
    """

    capability: tuple[int, int]
    driver: tuple[int, int]
    max_shared_bytes: int


def check_device(arch: Arch, device: Device, shared_bytes: int = 0) -> None:
    """Checks that machine code of `arch`, whose largest block takes `shared_bytes`, can run on `device`.

    Raises:
        ArchMismatch: names both, and the command that builds a fitting engine.
        DriverTooOld: the driver does not load what our compiler wrote for this arch.
    """
    major, minor = device.capability
    if not arch.runs_on(device.capability) or shared_bytes > device.max_shared_bytes:
        fitting = arch_for(device.capability)
        raise ArchMismatch(
            built_for=arch.name,
            found=f"sm_{major}{minor}",
            command=f"millrace build MODEL --arch {fitting.name if fitting else 'cpu'}",
        )
    needed = max(arch.min_driver, _PTX_DRIVER) if _uses_ptx(arch, device) else arch.min_driver
    if device.driver < needed:
        raise DriverTooOld(
            needed=".".join(map(str, needed)), found=".".join(map(str, device.driver))
        )


def _uses_ptx(arch: Arch, device: Device) -> bool:
    """Another minor revision of a portable arch runs its cubins; another major only its PTX."""
    return arch.capability is not None and arch.capability[0] != device.capability[0]


def _field(argument: Argument) -> Any:
    return ctypes.c_uint64() if argument.type.startswith("*") else _FIELDS[argument.type]()


class Kernel:
    """One loaded kernel: `kernel(grid, *arguments)` launches it on torch's current stream.

    Not thread-safe: the argument buffer is reused by each launch (the driver copies it).
    """

    def __init__(self, driver: Driver, record: KernelRecord, code: bytes) -> None:
        self._driver = driver
        self._name = record.symbol
        self._module = ctypes.c_void_p()
        self._function = ctypes.c_void_p()
        driver.check(
            driver.library.cuModuleLoadData(ctypes.byref(self._module), code),
            f"loading {record.symbol}",
        )
        driver.check(
            driver.library.cuModuleGetFunction(
                ctypes.byref(self._function), self._module, record.symbol.encode()
            ),
            f"finding {record.symbol}",
        )
        if record.shared_bytes > _DEFAULT_SHARED_BYTES:
            driver.check(
                driver.library.cuFuncSetAttribute(
                    self._function, _MAX_DYNAMIC_SHARED_BYTES, record.shared_bytes
                ),
                f"shared memory of {record.symbol}",
            )
        self._num_arguments = len(record.arguments)
        self._aligned = tuple(i for i, a in enumerate(record.arguments) if a.is_aligned)
        # A place for each argument and one more for each of Triton's two scratch pointers, which our kernels do not
        # use (aot.py asserts it); those of boxes have parameters of their own.
        self._values: list[Any] = []
        self._maps: list[tuple[int, int | None, TensorMap]] = []
        names = [argument.name for argument in record.arguments]
        parameters: list[int] = []
        for index, argument in enumerate(record.arguments):
            value = _field(argument)
            self._values.append(value)
            if argument.boxes is None:
                parameters.append(ctypes.addressof(value))
            else:
                rows = argument.boxes.rows
                place = None if isinstance(rows, int) else names.index(rows)
                made = TensorMap(driver, argument.type, argument.boxes)
                self._maps.append((index, place, made))
                parameters += made.parameters
        self._unused = ctypes.c_uint64()
        parameters += [ctypes.addressof(self._unused)] * 2
        self._pointers = (ctypes.c_void_p * len(parameters))(*parameters)
        self._attributes = (_Attribute * 1)()
        self._attributes[0].id = _PROGRAMMATIC_STREAM_SERIALIZATION
        self._attributes[0].value[0] = 1
        self._config = _Config(
            bx=32 * record.num_warps, by=1, bz=1, shared_bytes=record.shared_bytes,
            attributes=self._attributes, num_attributes=int(record.has_pdl),
        )  # fmt: skip
        self._config_at = ctypes.addressof(self._config)
        self._pointers_at = ctypes.addressof(self._pointers)

    def __call__(self, grid: Grid, *arguments: int | float) -> None:
        """Launches; pointers are passed as `tensor.data_ptr()`."""
        assert len(arguments) == self._num_arguments, f"{self._name}: wrong number of arguments"
        for index in self._aligned:
            assert arguments[index] % DIVISIBILITY == 0, f"{self._name}: argument {index} unaligned"
        for field, argument in zip(self._values, arguments, strict=True):
            field.value = argument
        for index, place, tensor_map in self._maps:
            rows = None if place is None else int(arguments[place])
            tensor_map.describe(int(arguments[index]), rows)
        config = self._config
        config.gx, config.gy, config.gz = grid
        config.stream = _current_stream()
        result = self._driver.launch_ex(self._config_at, self._function, self._pointers_at, None)
        if result:
            self._driver.check(result, f"launching {self._name}")


def _current_stream() -> int:
    import torch  # not at the head: code is loaded before it is there

    stream: int = torch.cuda.current_stream().cuda_stream
    return stream


class KernelLibrary:
    """An engine's kernels, loaded on the current device as they are first asked for, or all ahead.

    Args:
        index: the layer `kernels/index.json`.
        code: reads (offset, size) of the layer `kernels/code.bin`.
    Raises:
        ArchMismatch, DriverTooOld: as `check_device`.
        KernelMissing: another version wrote the index.
    """

    def __init__(self, index: bytes, code: Callable[[int, int], bytes]) -> None:
        raw = json.loads(index)
        self.arch = arch_named(raw["arch"])
        self._code = code
        self._records = {key: _record(key, entry) for key, entry in raw["kernels"].items()}
        self._driver = Driver()
        device = Device(
            self._driver.capability(), self._driver.version(), self._driver.max_shared_bytes()
        )
        largest = max((record.shared_bytes for record in self._records.values()), default=0)
        check_device(self.arch, device, largest)
        self.uses_ptx = _uses_ptx(self.arch, device)
        self._kernels: dict[str, Kernel] = {}

    def __contains__(self, variant: KernelVariant) -> bool:
        return variant.key in self._records

    def load_all(self) -> None:
        """Loads every kernel; for a thread that has time, while nobody else uses this.

        Not PTX, which the driver would compile: an engine has many kernels that a GPU's table does not choose.
        """
        for key in () if self.uses_ptx else self._records:
            self._load(key)

    def kernel(self, variant: KernelVariant) -> Kernel:
        """The loaded kernel.

        Raises:
            KernelMissing: the engine was not compiled with this variant.
        """
        loaded = self._kernels.get(variant.key)
        if loaded is not None:
            return loaded
        if variant not in self:
            raise KernelMissing(kernel=f"{variant.op}.{variant.kernel}")
        return self._load(variant.key)

    def _load(self, key: str) -> Kernel:
        if key not in self._kernels:
            record = self._records[key]
            place = record.ptx if self.uses_ptx else record.code
            code = self._code(*place) + b"\0"  # PTX is read as a C string
            self._kernels[key] = Kernel(self._driver, record, code)
        return self._kernels[key]


def _record(key: str, entry: dict[str, object]) -> KernelRecord:
    if not entry.keys() >= set(KernelRecord.__slots__):
        raise KernelMissing(kernel=key)
    fields = {name: entry[name] for name in KernelRecord.__slots__}
    for name in ("code", "ptx"):
        fields[name] = tuple(fields[name])  # type: ignore[arg-type]
    fields["arguments"] = tuple(_argument(*raw) for raw in fields["arguments"])  # type: ignore[attr-defined]
    return KernelRecord(**fields)  # type: ignore[arg-type]


def _argument(
    type_: str, is_aligned: bool, name: str = "", boxes: dict[str, Any] | None = None
) -> Argument:
    made = boxes and Boxes(**{**boxes, "box": tuple(boxes["box"])})
    return Argument(name, type_, is_aligned, made or None)
