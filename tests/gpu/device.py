"""Compiles variants for a GPU that is present, or for an older arch whose PTX it takes, and launches them.

`python -m tests.gpu.prebuild` compiles the largest sets on another machine: those are read from build/gpu-tests.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import torch

from kernels.aot import compile_variants, pack_kernels
from kernels.launcher import KernelLibrary
from kernels.variant import CODE_TITLE, INDEX_TITLE, KernelVariant
from shared.arch import ARCHES, Arch

# Where cases keep their tensors: on the host where they only tell which kernels they want.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def device_arch() -> Arch:
    """The row of the GPU that is present."""
    capability = torch.cuda.get_device_capability()
    return next(arch for arch in ARCHES.values() if arch.capability == capability)


def library_of(variants: set[KernelVariant], arch: Arch) -> KernelLibrary:
    """Machine code of `variants` for `arch`, on the device; compiled now where it was not before."""
    index, code = layers_of(variants, arch)
    return KernelLibrary(index, lambda offset, size: code[offset : offset + size])


def layers_of(variants: set[KernelVariant], arch: Arch) -> tuple[bytes, bytes]:
    """The two kernel layers of `variants` for `arch`; compiled now where they were not before."""
    folder = prebuilt_folder(variants, arch)
    if folder.is_dir():
        return (folder / "index.json").read_bytes(), (folder / "code.bin").read_bytes()
    return compiled(variants, arch)


def compiled(variants: set[KernelVariant], arch: Arch) -> tuple[bytes, bytes]:
    """The two kernel layers."""
    kernels = compile_variants(variants, arch, num_processes=os.cpu_count())
    layers = dict(pack_kernels(kernels, arch))
    return layers[INDEX_TITLE], layers[CODE_TITLE]


def prebuilt_folder(variants: set[KernelVariant], arch: Arch) -> Path:
    """Where the machine code of just these variants, of just these sources, would be."""
    root = Path(__file__).parents[2]
    digest = hashlib.sha256(arch.name.encode())
    for key in sorted(variant.key for variant in variants):
        digest.update(key.encode())
    shapers = root / "kernels/aot.py", root / "kernels/variant.py"
    for source in (*sorted(root.glob("kernels/*/triton*.py")), *shapers):
        digest.update(source.read_bytes())
    return root / "build/gpu-tests" / digest.hexdigest()[:16]


class Collector:
    """Gathers variants on a first pass over the cases, so that all are compiled at once; then launches."""

    def __init__(self) -> None:
        self.variants: set[KernelVariant] = set()
        self.library: KernelLibrary | None = None

    def expect(self, variants: Iterable[KernelVariant]) -> None:
        """Notes all that a case launches, where that is more than its first."""
        if self.library is None:
            self.variants.update(variants)

    def __call__(
        self,
        variant: KernelVariant,
        grid: tuple[int, int, int],
        operands: dict[str, torch.Tensor | int | float],
    ) -> None:
        """Launches `variant`, or only notes it before `library` is set."""
        if self.library is None:
            self.variants.add(variant)
            raise NotYetCompiled
        values = [operands[a.name] for a in variant.arguments]
        pointers = [v.data_ptr() if isinstance(v, torch.Tensor) else v for v in values]
        self.library.kernel(variant)(grid, *pointers)
        torch.cuda.synchronize()


class NotYetCompiled(Exception):
    """Ends a case on the collecting pass."""
