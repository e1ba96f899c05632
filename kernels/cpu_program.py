"""Calls of CPU kernels, recorded once and then made without Python: what a captured graph is on a GPU.

A step of one token calls some 270 kernels of a 135M model, and what Python does around each takes 6 us, a fifth of the
step. A recording is of addresses and sizes: it holds for whatever stands in its tensors.

Source of the idea: CUDA graphs' stream capture.
"""

import math
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target
from numba.extending import intrinsic
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.cpu_jit import Call, Kernel, device, recording, typed

Result = TypeVar("Result")

_ATEN = torch.ops.aten
_ALLOCATIONS = {_ATEN.empty.memory_format, _ATEN.empty_like.default, _ATEN.new_empty.default}
# They compute nothing: the same memory, seen otherwise.
_VIEWS = {
    _ATEN.detach.default,
    _ATEN.view.default,
    _ATEN.slice.Tensor,
    _ATEN.select.int,
    _ATEN.split_with_sizes.default,
}

_LONG, _SLOT_BYTES = ir.IntType(64), 8
_ENTRY = ir.FunctionType(ir.VoidType(), [_LONG])
_LONG_TAG = np.int64(0)


class Buffers:
    """Memory for the tensors of programs, of which one runs at a time.

    A block is used again once its tensor and all views of that are gone, within a recording and by the next one:
    a program writes what it reads.
    """

    def __init__(self) -> None:
        self._free: list[torch.Tensor] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A dense tensor of no particular values."""
        num_bytes = max(math.prod(shape), 1) * dtype.itemsize
        fitting = [i for i, block in enumerate(self._free) if len(block) >= num_bytes]
        if fitting:
            block = self._free.pop(min(fitting, key=lambda i: len(self._free[i])))
        else:
            block = torch.empty(num_bytes, dtype=torch.uint8)
        # The tensor's storage holds this array alone, and so ends it.
        lent = block[:num_bytes].numpy()
        weakref.finalize(lent, self._free.append, block).atexit = False
        flat = torch.frombuffer(lent, dtype=dtype, count=max(math.prod(shape), 1))
        return flat[: math.prod(shape)].view(*shape)


class Program:
    """Recorded calls, made again in their order.

    Args:
        constants: tensors that they read and no call writes.
    """

    def __init__(self, calls: Sequence[Call], constants: Sequence[torch.Tensor]) -> None:
        self._constants = list(constants)
        self._arguments = [_packed(arguments) for _, arguments in calls]
        self._calls_N2 = np.empty((len(calls), 2), np.int64)
        for i, (kernel, arguments) in enumerate(calls):
            entry = _entry(kernel, tuple(map(numba.typeof, arguments)))
            self._calls_N2[i] = entry, self._arguments[i].ctypes.data

    def __len__(self) -> int:
        return len(self._calls_N2)

    def run(self) -> None:
        """Calls them; on the threads that this thread's kernels run on."""
        _make_calls(self._calls_N2.ctypes.data, len(self._calls_N2))


def record(run: Callable[[], Result], buffers: Buffers) -> tuple[Result, Program | None]:
    """What `run` gives, and the program that writes it again.

    Args:
        run: calls kernels; tensors that it makes meanwhile are of `buffers`, and those that it reads must stay.
    Returns:
        No program where torch computed something of tensors' values, which a program would not do again.
    """
    assert recording.calls is None, "a recording within a recording"
    calls: list[Call] = []
    recording.calls = calls
    watch = _Watch(buffers)
    try:
        with watch:
            result = run()
    finally:
        recording.calls = None
    return result, Program(calls, watch.constants) if watch.is_whole else None


class _Watch(TorchDispatchMode):
    """Sees what torch does beside the kernels."""

    def __init__(self, buffers: Buffers) -> None:
        super().__init__()
        self._buffers = buffers
        self.constants: list[torch.Tensor] = []
        self.is_whole = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            return self._buffers.empty(result.shape, result.dtype)
        if any(isinstance(value, torch.Tensor) for value in args):
            self.is_whole &= func in _VIEWS
        else:
            self.constants.append(result)
        return result


def _packed(arguments: tuple[Any, ...]) -> np.ndarray:
    """Numbers, eight bytes each, in the form that their types have in memory."""
    slots = (np.asarray(value).tobytes().ljust(_SLOT_BYTES, b"\0") for value in arguments)
    return np.frombuffer(b"".join(slots), np.uint64)


@cache
@global_compiler_lock
def _entry(kernel: Kernel, argument_types: tuple[Any, ...]) -> int:
    """The address of a function that takes the address of packed arguments and calls the kernel with them."""
    kernel.dispatcher.compile(argument_types)
    compiled = kernel.dispatcher.overloads[argument_types]
    name = compiled.fndesc.llvm_func_name
    context = cpu_target.target_context
    library = context.codegen().create_library("entry")
    module = library.create_ir_module("entry")
    function = ir.Function(module, _ENTRY, f"entry_{name}")
    builder = ir.IRBuilder(function.append_basic_block())
    values = []
    for i, kind in enumerate(argument_types):
        slot = builder.add(function.args[0], ir.Constant(_LONG, _SLOT_BYTES * i))
        pointer = context.get_value_type(kind).as_pointer()
        values.append(builder.load(builder.inttoptr(slot, pointer)))
    # By address: the kernel's code is there, and need not be compiled or linked again.
    code = ir.Constant(_LONG, compiled.library.get_pointer_to_function(name))
    form = context.call_conv.get_function_type(types.none, argument_types)
    callee = builder.inttoptr(code, form.as_pointer())
    context.call_conv.call_function(builder, callee, types.none, argument_types, values)
    builder.ret_void()
    library.add_ir_module(module)
    library.finalize()
    _LIBRARIES.append(library)
    return int(library.get_pointer_to_function(function.name))


# Code lives as long as its library.
_LIBRARIES: list[Any] = []


@intrinsic
def _call(context: Any, entry_at: Any, arguments_at: Any) -> Any:
    """Calls an entry."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        entry_at, arguments_at = arguments
        builder.call(builder.inttoptr(entry_at, _ENTRY.as_pointer()), [arguments_at])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@device
def _make_calls(calls_at: Any, count: Any) -> Any:
    calls = typed(calls_at, _LONG_TAG)
    for i in range(count):
        _call(calls[2 * i], calls[2 * i + 1])
