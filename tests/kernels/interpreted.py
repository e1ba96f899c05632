"""Runs a kernel variant on the CPU through Triton's interpreter, on named tensors.

Import this before any `kernels.*.triton`: Triton reads its switch when kernels are defined.
"""

import importlib
import os
from dataclasses import replace

os.environ["TRITON_INTERPRET"] = "1"

import torch

from kernels.variant import KernelVariant
from shared.arch import ARCHES, Arch

# The interpreter has no PDL: an arch without it, otherwise like the newest ones.
INTERPRETER: Arch = replace(ARCHES["sm_80"], name="interpreter")


def run(
    variant: KernelVariant, grid: tuple[int, int, int], operands: dict[str, torch.Tensor | int]
) -> None:
    """Executes `variant` over `grid`; `operands` by argument name, more than are needed may be given."""
    kernel = getattr(importlib.import_module(f"kernels.{variant.op}.triton"), variant.kernel)
    arguments = {a.name: operands[a.name] for a in variant.arguments}
    kernel[grid](**arguments, **dict(variant.constants))
