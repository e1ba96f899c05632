"""What the CPU kernels are written with: compiled Python (Numba) over raw addresses.

`kernels/<op>/cpu_kernel.py` holds an op's loops; an op's `cpu.py` calls them with addresses, as the launcher does on
a GPU. They are compiled for this machine's CPU when an engine is first loaded, and kept in a folder named by the
kernels' sources. bf16 travels as its bits, uint16: the upper half of an fp32; e4m3 as uint8.

A kernel is written once for all its element types. It is told them by *tags*, values that only have a type:
`typed(address, tag)` is a pointer to the tag's type, `load` gives fp32 and `store` rounds to it.
"""

import fcntl
import hashlib
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core.caching import FunctionCache
from numba.core.registry import cpu_target
from numba.extending import intrinsic

_Function = Callable[..., Any]

# OpenMP's threads spin between two loops; where torch and Numba share one OpenMP library
# (`shared/process.py` sees to it) they are the same threads.
numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]

_WORD = ir.IntType(32)
_BF16_NAN = 0x7FC0

# Sums may be reordered into vectors; NaN and infinity keep their meaning. A division that can raise makes no vector.
_OPTIONS = {
    "fastmath": {"contract", "reassoc", "nsz", "arcp"},
    "error_model": "numpy",
    "nogil": True,
}

# What stands for an element type in a kernel's arguments.
TAGS = {
    torch.float32: np.float32(0),
    torch.bfloat16: np.uint16(0),
    torch.int8: np.int8(0),
    torch.float8_e4m3fn: np.uint8(0),
}


def cache_folder() -> Path | None:
    """Where compiled kernels are kept: NUMBA_CACHE_DIR, beside this file, or in the user's cache.

    Named by the sources of all kernels, as Numba looks only at the file that defines a function. None where no
    folder can be written to: every start compiles then.
    """
    here = Path(__file__).parent
    digest = hashlib.sha256(numba.__version__.encode())
    for source in (Path(__file__), *sorted(here.glob("*/cpu_kernel*.py"))):
        digest.update(source.read_bytes())
    told = numba.config.CACHE_DIR
    bases = (
        (Path(told),) if told else (here / "__pycache__", Path("~/.cache/millrace").expanduser())
    )
    for base in bases:
        folder = base / f"kernels-{digest.hexdigest()[:16]}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:  # read-only, or no home: the next one may do
            continue
        if os.access(folder, os.W_OK):
            return folder
    return None


CACHE_FOLDER = cache_folder()


class _KernelCache(FunctionCache):  # type: ignore[misc]
    """Numba's cache, for several processes at once and for disks that are full.

    Numba rewrites an index without a lock: two processes could give two kernels one name.
    """

    def save_overload(self, signature: Any, compiled: Any) -> None:
        """Keeps a compiled kernel; one that cannot be kept is compiled again at the next start."""
        assert CACHE_FOLDER is not None, "a cache without a folder"
        try:
            with (CACHE_FOLDER / "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                super().save_overload(signature, compiled)
        except OSError:  # the disk is full
            return

    def load_overload(self, signature: Any, target: Any) -> Any:
        """The kept kernel, or None."""
        try:
            return super().load_overload(signature, target)
        except (
            OSError,
            EOFError,
            pickle.UnpicklingError,
        ):  # cut off by a full disk: as good as absent
            return None


class Kernel:
    """A compiled kernel.

    Args:
        dispatcher: Numba's, which compiles it for the types that it is called with.
    """

    def __init__(self, dispatcher: Any) -> None:
        self.dispatcher = dispatcher

    def __call__(self, *arguments: Any) -> None:
        """Runs it, and notes the call where this thread records."""
        self.dispatcher(*arguments)
        if (calls := recording.calls) is not None:
            calls.append((self, arguments))


Call = tuple[Kernel, tuple[Any, ...]]


class _Recording(threading.local):
    calls: list[Call] | None = None


# What this thread calls goes to its `calls`, where `kernels/cpu_program.py` has set them.
recording = _Recording()


def kernel(function: _Function) -> Kernel:
    """Compiles a kernel; its `prange` loops run on all threads."""
    return Kernel(_compiled(function, parallel=True))


def device(function: _Function) -> _Function:
    """Compiles a function that kernels call: into each of them, so that how it sums is settled when they are compiled.

    A call would reach whichever copy this process loaded first, a kernel's or one compiled alone, and copies are
    optimized apart: a process that compiles a kernel would have other last bits than one that finds it kept.
    """
    return _compiled(function, forceinline=True)


def _compiled(function: _Function, **options: bool) -> _Function:
    dispatcher = numba.njit(**_OPTIONS, **options)(function)
    if CACHE_FOLDER is not None:
        told, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(CACHE_FOLDER)
        dispatcher._cache = _KernelCache(dispatcher.py_func)
        numba.config.CACHE_DIR = told
    return dispatcher  # type: ignore[no-any-return]


def set_num_threads(num_threads: int = 0) -> None:
    """How many threads torch's operators and kernels use that this thread calls; 0: as many as torch's."""
    if num_threads:
        torch.set_num_threads(num_threads)
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))


def has_feature(name: str) -> bool:
    """Claims that kernels are compiled for a CPU with a feature, by LLVM's name for it."""
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    return f"+{name}" in features.split(",")


def multiplies_bytes() -> bool:
    """Claims that kernels are compiled for a CPU with AVX512 VNNI."""
    return has_feature("avx512vnni")


def address(tensor: torch.Tensor | None, dtype: torch.dtype) -> int:
    """Where a dense tensor begins, 0 for none. Kernels cannot look at what they are given, so this does."""
    if tensor is None:
        return 0
    assert tensor.dtype == dtype, f"a kernel wants {dtype}, not {tensor.dtype}"
    assert tensor.is_contiguous(), "a kernel wants a dense tensor"
    return tensor.data_ptr()


@intrinsic
def typed(context: Any, address: Any, tag: Any) -> Any:
    """A pointer to the tag's type at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(tag)(types.int64, tag), generate


@intrinsic
def prefetch(context: Any, address: Any) -> Any:
    """Asks for the cache line at an address, which need not exist, into the second-level cache."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        declared = ir.FunctionType(ir.VoidType(), [byte, _WORD, _WORD, _WORD])
        function = builder.module.declare_intrinsic("llvm.prefetch", [byte], declared)
        read, second_level, data = (ir.Constant(_WORD, value) for value in (0, 2, 1))
        place = builder.inttoptr(arguments[0], byte)
        builder.call(function, [place, read, second_level, data])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def element_address(context: Any, pointer: Any, index: Any) -> Any:
    """The address of the element at an index."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ptrtoint(builder.gep(arguments[0], [arguments[1]]), ir.IntType(64))

    return types.int64(pointer, types.int64), generate


@intrinsic
def elements_per_line(context: Any, pointer: Any) -> Any:
    """How many elements a cache line of 64 bytes holds."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(ir.IntType(64), 64 * 8 // pointer.dtype.bitwidth)

    return types.int64(pointer), generate


@intrinsic
def load(context: Any, pointer: Any, index: Any) -> Any:
    """The element at an index, as fp32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = builder.load(builder.gep(arguments[0], [arguments[1]]))
        if pointer.dtype == types.uint16:
            bits = builder.shl(builder.zext(value, _WORD), ir.Constant(_WORD, 16))
            return builder.bitcast(bits, ir.FloatType())
        if pointer.dtype == types.int8:
            return builder.sitofp(value, ir.FloatType())
        if pointer.dtype == types.uint8:
            # Exponent and mantissa to where fp32 has them; its exponent is larger by 120. No NaN is read.
            word = builder.zext(value, _WORD)
            sign = builder.shl(builder.and_(word, ir.Constant(_WORD, 0x80)), ir.Constant(_WORD, 24))
            rest = builder.shl(builder.and_(word, ir.Constant(_WORD, 0x7F)), ir.Constant(_WORD, 20))
            small = builder.bitcast(builder.or_(sign, rest), ir.FloatType())
            return builder.fmul(small, ir.Constant(ir.FloatType(), 2.0**120))
        assert pointer.dtype == types.float32, f"kernels do not read {pointer.dtype}"
        return value

    return types.float32(pointer, types.int64), generate


@intrinsic
def store(context: Any, pointer: Any, index: Any, value: Any) -> Any:
    """Keeps an fp32 value at an index, rounded to nearest, ties to even. In 8 bits: one that is within their range."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place, kept = builder.gep(arguments[0], [arguments[1]]), arguments[2]
        if pointer.dtype == types.uint16:
            bits = builder.bitcast(kept, _WORD)
            upper = builder.lshr(bits, ir.Constant(_WORD, 16))
            odd = builder.and_(upper, ir.Constant(_WORD, 1))
            half = builder.add(odd, ir.Constant(_WORD, 0x7FFF))
            rounded = builder.lshr(builder.add(bits, half), ir.Constant(_WORD, 16))
            is_nan = builder.fcmp_unordered(
                "uno", kept, kept
            )  # rounding could carry it into infinity or 0
            kept = builder.select(is_nan, ir.Constant(_WORD, _BF16_NAN), rounded)
            kept = builder.trunc(kept, ir.IntType(16))
        elif pointer.dtype in _CODES:
            rounded = pointer.dtype(types.float32)
            kept = context.compile_internal(builder, _CODES[pointer.dtype], rounded, [kept])
        else:
            assert pointer.dtype == types.float32, f"kernels do not write {pointer.dtype}"
        builder.store(kept, place)
        return context.get_dummy_value()

    return types.void(pointer, types.int64, types.float32), generate


@intrinsic
def put(context: Any, pointer: Any, index: Any, value: Any) -> Any:
    """Keeps an int64 at an index. Numba takes `pointer[index] = value` in a parallel loop for code without effect."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store(arguments[2], builder.gep(arguments[0], [arguments[1]]))
        return context.get_dummy_value()

    return types.void(types.CPointer(types.int64), types.int64, types.int64), generate


@intrinsic
def to_bits(context: Any, value: Any) -> Any:
    """The bits of an fp32, as int32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _WORD)

    return types.int32(types.float32), generate


@intrinsic
def of_bits(context: Any, value: Any) -> Any:
    """The fp32 that has the bits of an int32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


def _int8(value: Any) -> Any:
    return np.int8(np.rint(value))


def _e4m3(value: Any) -> Any:
    bits = to_bits(value)
    magnitude = bits & np.int32(0x7FFFFFFF)
    # Below 2 ** -6 codes count steps of 2 ** -9; from there on they are fp32's upper bits, the exponent less 120.
    steps = np.int32(np.rint(of_bits(magnitude) * np.float32(2**9)))
    odd = (magnitude >> np.int32(20)) & np.int32(1)
    rounded = ((magnitude + np.int32(0x7FFFF) + odd) >> np.int32(20)) - np.int32(120 << 3)
    code = steps if magnitude < np.int32(121 << 23) else rounded
    return np.uint8(((bits >> np.int32(24)) & np.int32(0x80)) | code)


# How `store` rounds to types of 8 bits.
_CODES = {types.int8: _int8, types.uint8: _e4m3}


@intrinsic
def larger(context: Any, a: Any, b: Any) -> Any:
    """The larger of two fp32, either where one is NaN. Maxima over a loop become vectors."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        flags = ("nnan", "nsz")
        is_larger = builder.fcmp_ordered(">", *arguments, flags=flags)
        return builder.select(is_larger, *arguments, flags=flags)

    return types.float32(types.float32, types.float32), generate


def spread(builder: Any, value: Any, kind: Any) -> Any:
    """A vector of one value, in an intrinsic's code."""
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_WORD, 0))
    order = ir.Constant(ir.VectorType(_WORD, kind.count), [0] * kind.count)
    return builder.shuffle_vector(first, first, order)


@intrinsic
def _power_of_two(context: Any, exponent: Any) -> Any:
    """2 ** exponent, fp32, for -126 to 127: the exponent's bits put into place."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        biased = builder.add(arguments[0], ir.Constant(_WORD, 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(_WORD, 23)), ir.FloatType())

    return types.float32(types.int32), generate


@device
def exp(x: Any) -> Any:
    """e ** x in fp32, to 4 parts in 10 ** 7, for x from -87 to 88, and at the nearer end beyond. Loops become vectors.

    x = (n + f) ln 2 with n whole and |f| <= 1/2;  e ** x = 2 ** n * 2 ** f, the latter a polynomial.
    """
    x = np.float32(-87.0) if x < np.float32(-87.0) else x
    x = np.float32(88.0) if x > np.float32(88.0) else x
    scaled = x * np.float32(1.44269504)
    n = np.floor(scaled + np.float32(0.5))
    # ln 2 in two parts, so that f keeps its last bits.
    f = (x - n * np.float32(0.693359375)) - n * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * f + np.float32(1.3981999507e-3)
    p = p * f + np.float32(8.3334519073e-3)
    p = p * f + np.float32(4.1665795894e-2)
    p = p * f + np.float32(1.6666665459e-1)
    p = p * f + np.float32(5.0000001201e-1)
    p = p * f * f + f + np.float32(1.0)
    return p * _power_of_two(np.int32(n))
