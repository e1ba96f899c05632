"""Runs a kernel variant on the CPU through Triton's interpreter, on named tensors.

Triton reads its switch when it is imported, so its interpreter and its compiler cannot share a
process: `make test` gives these tests one of their own.
"""

import importlib
import os
import sys
from dataclasses import replace

import pytest

if "TRITON_INTERPRET" not in os.environ:
    if "triton" in sys.modules:
        pytest.skip("Triton compiles in this process already", allow_module_level=True)
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from kernels.variant import KernelVariant
from shared.arch import ARCHES, Arch

# The interpreter has no PDL: an arch without it, otherwise like the newest ones.
INTERPRETER: Arch = replace(ARCHES["sm_80"], name="interpreter")


def run(
    variant: KernelVariant,
    grid: tuple[int, int, int],
    operands: dict[str, torch.Tensor | int | float],
) -> None:
    """Executes `variant` over `grid`; `operands` by argument name, more than are needed may be given."""
    kernel = getattr(importlib.import_module(f"kernels.{variant.op}.triton"), variant.kernel)
    arguments = {a.name: operands[a.name] for a in variant.arguments}
    kernel[grid](**arguments, **dict(variant.constants))
