"""The `builder` part of an engine's key: what the code that makes its bytes does.

    <format version>-<weights>           for arches without machine code
    <format version>-<weights>-<kernels> for the others

`weights` covers graph, packed weights and files, `kernels` the machine code, each with the
libraries that change its bytes. torch is not among them: layouts use only arithmetic that IEEE 754
defines, so its releases and its CPU and CUDA builds give the same bytes. Where a weight was chosen
by a calibration, and in the quality report, last bits depend on the CPU too: there the first
publish wins.
"""

import functools
from pathlib import Path

from shared.arch import arch_named
from shared.engine import FORMAT_VERSION, EngineKey
from shared.fingerprint import fingerprint

_DIGITS = 16
_WEIGHT_MODULES = (
    "compiler_service.checkpoints.sources",
    "compiler_service.engine_files",
    "compiler_service.engine_graph",
    "compiler_service.models",
    "compiler_service.passes",
    "compiler_service.quantization",
    "compiler_service.quantized_weights",
    "compiler_service.weight_table",
    "shared.weight_layout",
)
_WEIGHT_LIBRARIES = ("gguf", "tokenizers")
_KERNEL_MODULES = ("kernels.aot", "kernels.lowering")
# Triton carries the ptxas that it calls.
_KERNEL_LIBRARIES = ("triton",)


def builder_for(arch_name: str) -> str:
    """The builder of engines for an arch, as this code is now.

    Raises:
        UnsupportedArch: there is no such arch.
    """
    weights = f"{FORMAT_VERSION}-{_weights_fingerprint()}"
    return f"{weights}-{_kernels_fingerprint()}" if arch_named(arch_name).is_gpu else weights


def weights_part(builder: str) -> str:
    """The part of a builder that two arches share."""
    return "-".join(builder.split("-")[:2])


def share_weights(one: EngineKey, other: EngineKey) -> bool:
    """Claims that two engines differ in machine code at most."""
    return (one.model_digest, one.quant, weights_part(one.builder)) == (
        other.model_digest,
        other.quant,
        weights_part(other.builder),
    )


@functools.cache
def _weights_fingerprint() -> str:
    return fingerprint(_WEIGHT_MODULES, _WEIGHT_LIBRARIES)[:_DIGITS]


@functools.cache
def _kernels_fingerprint() -> str:
    # Kernels are imported by name where they are compiled, which no import statement shows.
    folder = Path(__file__).parents[1] / "kernels"
    kernels = [f"kernels.{path.parent.name}.triton" for path in sorted(folder.glob("*/triton.py"))]
    return fingerprint((*_KERNEL_MODULES, *kernels), _KERNEL_LIBRARIES)[:_DIGITS]
