"""Triton to machine code with no GPU present: the only place that calls `triton.compile`.

Kernels are compiled in worker processes: Triton's switches are environment variables read at import,
a failing ptxas prints the whole PTX to stdout, and two processes are twice as fast as one. What the
kernels mean, and which of them a model needs, is not known here.
"""

import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from kernels.cubin import parameter_sizes
from kernels.variant import (
    BOXED_BITS,
    BOXES_PARAMETERS,
    CODE_TITLE,
    DIVISIBILITY,
    INDEX_TITLE,
    Argument,
    KernelRecord,
    KernelVariant,
)
from shared.arch import Arch, arch_named
from shared.process import end_with_parent

# After a kernel's own arguments Triton passes two pointers: global scratch and profile scratch.
_TRAILING_POINTERS = (8, 8)
# Each takes 0.4 GB, however large the model.
_MOST_PROCESSES = 8
_TYPE_BYTES = {"i32": 4, "i64": 8, "fp32": 4}


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    """Machine code of one variant for one arch.

    Args:
        num_warps: the variant's, and those that specialize in copies.
        ptx: text for the driver's compiler.
    """

    variant: KernelVariant
    symbol: str
    num_warps: int
    shared_bytes: int
    cubin: bytes
    ptx: bytes


def compile_variants(
    variants: Iterable[KernelVariant],
    arch: Arch,
    *,
    num_processes: int | None = None,
    on_share: Callable[[float], None] = lambda share: None,
) -> list[CompiledKernel]:
    """Machine code of `variants`, each once, sorted by key: equal input gives equal bytes.

    Args:
        on_share: told the share of them that is compiled, now and then.
    Raises:
        AssertionError: a variant exceeds the arch's shared memory, wants scratch memory, or takes other
            parameters than it declares; says which.
    """
    unique = {variant.key: variant for variant in variants}
    jobs = [(unique[key], arch.name) for key in sorted(unique)]
    processes = max(1, min(num_processes or _num_processes(), len(jobs)))
    with compile_pool(processes) as pool:
        compiled = []
        for kernel in pool.map(_compile_job, jobs, chunksize=1 + len(jobs) // (32 * processes)):
            compiled.append(kernel)
            on_share(len(compiled) / len(jobs))
        return compiled


@contextlib.contextmanager
def compile_pool(num_processes: int) -> Iterator[ProcessPoolExecutor]:
    """Processes to compile in, started from this thread as they are needed; they end with it, however it does."""
    context = multiprocessing.get_context("spawn")
    # A cache of its own each time: Triton's is keyed by its environment, and ours is the store.
    with (
        tempfile.TemporaryDirectory(prefix="millrace-triton-") as cache,
        ProcessPoolExecutor(num_processes, context, _prepare_worker, (cache, os.getpid())) as pool,
    ):
        yield pool


def pack_kernels(kernels: Iterable[CompiledKernel], arch: Arch) -> list[tuple[str, bytes]]:
    """The engine's kernel layers, (title, bytes): an index by variant key, and all code in one blob.

    PTX travels where the arch's code is portable: the driver of a newer device compiles it.
    """
    code = bytearray()

    def append(part: bytes) -> tuple[int, int]:
        code.extend(b"\0" * (-len(code) % DIVISIBILITY))
        code.extend(part)
        return len(code) - len(part), len(part)

    index = {}
    for kernel in sorted(kernels, key=lambda k: k.variant.key):
        record = KernelRecord(
            symbol=kernel.symbol,
            arguments=kernel.variant.arguments,
            num_warps=kernel.num_warps,
            shared_bytes=kernel.shared_bytes,
            has_pdl=kernel.variant.has_pdl,
            code=append(kernel.cubin),
            ptx=append(kernel.ptx) if arch.is_portable else (0, 0),
        )
        index[kernel.variant.key] = {
            **asdict(record),
            "arguments": [
                _entry(a, any(b.boxes for b in record.arguments)) for a in record.arguments
            ],
            "constants": dict(sorted(kernel.variant.constants)),
        }
    text = json.dumps(
        {"arch": arch.name, "min_driver": arch.min_driver, "kernels": index},
        sort_keys=True,
        separators=(",", ":"),
    )
    return [(INDEX_TITLE, text.encode()), (CODE_TITLE, bytes(code))]


def compile_kernel(
    function: Any, variant: KernelVariant, arch: Arch
) -> CompiledKernel:  # `function` is a triton JITFunction
    """Machine code of one variant, in this process (which must have been started for it).

    Raises:
        AssertionError: as `compile_variants`.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    assert arch.capability is not None, f"{arch.name} has no machine code"
    types = {a.name: _triton_type(a) for a in variant.arguments}
    constants = dict(variant.constants)
    names = list(function.arg_names)
    assert set(names) == set(types) | set(constants), (
        f"{variant.key}: the kernel takes {names}, the variant gives {[*types, *constants]}"
    )
    assert [n for n in names if n in types] == list(types), f"{variant.key}: arguments out of order"
    make = GluonASTSource if function.is_gluon() else ASTSource
    source = make(
        fn=function,
        signature={n: types.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={
            (names.index(a.name),): [["tt.divisibility", DIVISIBILITY]]
            for a in variant.arguments
            if a.is_aligned and a.boxes is None
        },
    )
    major, minor = arch.capability
    options = {
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        "launch_pdl": variant.has_pdl,
    }
    with _stdout_to_stderr():
        built = triton.compile(
            source, target=GPUTarget("cuda", major * 10 + minor, 32), options=options
        )
    kernel = CompiledKernel(
        variant=variant,
        symbol=built.metadata.name,
        num_warps=built.metadata.num_warps,
        shared_bytes=built.metadata.shared,
        cubin=built.asm["cubin"],
        ptx=built.asm["ptx"].encode(),
    )
    _check(kernel, arch, built.metadata)
    return kernel


def _check(kernel: CompiledKernel, arch: Arch, metadata: Any) -> None:
    variant = kernel.variant
    assert kernel.shared_bytes <= arch.max_shared_bytes, (
        f"{variant.key} uses {kernel.shared_bytes} bytes of shared memory, {arch.name} has "
        f"{arch.max_shared_bytes}: {dict(variant.constants)}"
    )
    assert metadata.global_scratch_size == 0, f"{variant.key} wants global scratch memory"
    assert metadata.profile_scratch_size == 0, f"{variant.key} wants profile scratch memory"
    expected = tuple(size for a in variant.arguments for size in _parameter_bytes(a))
    found = parameter_sizes(kernel.cubin)[kernel.symbol]
    assert found == expected + _TRAILING_POINTERS, (
        f"{variant.key} takes parameters of {found} bytes, declared are {expected}"
    )


def _entry(argument: Argument, has_boxes: bool) -> list[object]:
    """As `kernels/index.json` has it; of kernels with boxes, whose rows may be named, with names."""
    entry: list[object] = [argument.type, argument.is_aligned]
    if not has_boxes:
        return entry
    return [*entry, argument.name, argument.boxes and asdict(argument.boxes)]


def _triton_type(argument: Argument) -> str:
    """As Triton's signatures have it."""
    boxes = argument.boxes
    if boxes is None:
        return argument.type
    dtype = argument.type.removeprefix("*")
    layout = f"NVMMASharedLayout({boxes.swizzle}, {BOXED_BITS[argument.type]}, 2)"
    return f"tensordesc<{dtype}[{boxes.box[0]}, {boxes.box[1]}],{layout}>"


def _parameter_bytes(argument: Argument) -> tuple[int, ...]:
    if argument.boxes is not None:
        return BOXES_PARAMETERS
    return (8 if argument.type.startswith("*") else _TYPE_BYTES[argument.type],)


def _num_processes() -> int:
    allowed = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return min(allowed, _MOST_PROCESSES)


def _prepare_worker(cache: str, parent: int) -> None:
    # A pool's processes hold both ends of its pipe: they would wait for work for ever.
    end_with_parent(parent, signal.SIGKILL)
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # line info embeds source paths
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = cache


def _compile_job(job: tuple[KernelVariant, str]) -> CompiledKernel:
    variant, arch_name = job
    module = importlib.import_module(f"kernels.{variant.op}.triton")
    return compile_kernel(getattr(module, variant.kernel), variant, arch_named(arch_name))


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
