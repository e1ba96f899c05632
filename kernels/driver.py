"""The CUDA driver, libcuda, called through ctypes: a device, its context, its capability. torch is not known here."""

import ctypes

_CAPABILITY = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
_MAX_SHARED_BYTES = 97  # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN


class CudaError(RuntimeError):
    """The driver refused a call: our own mistake, or a device that is lost."""


class Driver:
    """libcuda, with a context current on this thread: the one that was, else the first device's primary one.

    torch uses the primary context too, and need not be imported yet. Other threads share what is loaded here.

    Raises:
        OSError: there is no driver.
        CudaError: there is no device that can be used.
    """

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcuda.so.1")
        # These take microseconds: to give up Python's lock and to wait for it again takes longer.
        quick = ctypes.PyDLL("libcuda.so.1")
        self.launch_ex = quick.cuLaunchKernelEx
        self.launch_ex.argtypes = (ctypes.c_void_p,) * 4
        self.encode_tiled = quick.cuTensorMapEncodeTiled
        number, pointer = ctypes.c_int, ctypes.c_void_p
        self.encode_tiled.argtypes = (
            pointer, number, ctypes.c_uint32, pointer, pointer, pointer, pointer, pointer,
            number, number, number, number,
        )  # fmt: skip
        self.check(self.library.cuInit(0), "cuInit")
        self._device = ctypes.c_int()
        context = ctypes.c_void_p()
        self.check(self.library.cuCtxGetCurrent(ctypes.byref(context)), "cuCtxGetCurrent")
        if not context:
            self._make_primary_current()
        self.check(self.library.cuCtxGetDevice(ctypes.byref(self._device)), "cuCtxGetDevice")

    def check(self, result: int, what: str) -> None:
        """Raises CudaError where `result` is not CUDA_SUCCESS."""
        if result:
            text = ctypes.c_char_p()
            self.library.cuGetErrorString(result, ctypes.byref(text))
            raise CudaError(f"{what}: {(text.value or b'unknown error').decode()} ({result})")

    def version(self) -> tuple[int, int]:
        """The CUDA version that the driver speaks."""
        number = ctypes.c_int()
        self.check(self.library.cuDriverGetVersion(ctypes.byref(number)), "cuDriverGetVersion")
        return number.value // 1000, number.value % 1000 // 10

    def capability(self) -> tuple[int, int]:
        """The device's compute capability."""
        major, minor = (self._attribute(number) for number in _CAPABILITY)
        return major, minor

    def max_shared_bytes(self) -> int:
        """Shared memory that one thread block of the device may use."""
        return self._attribute(_MAX_SHARED_BYTES)

    def _attribute(self, number: int) -> int:
        value = ctypes.c_int()
        call = self.library.cuDeviceGetAttribute
        self.check(call(ctypes.byref(value), number, self._device), "cuDeviceGetAttribute")
        return value.value

    def _make_primary_current(self) -> None:
        """Never released: it lives as long as the process, as torch's does."""
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self.check(self.library.cuDeviceGet(ctypes.byref(device), 0), "cuDeviceGet")
        retain = self.library.cuDevicePrimaryCtxRetain
        self.check(retain(ctypes.byref(context), device), "cuDevicePrimaryCtxRetain")
        self.check(self.library.cuCtxSetCurrent(context), "cuCtxSetCurrent")
