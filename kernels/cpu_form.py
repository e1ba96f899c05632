"""What a fast CPU form of an op is, and what it may know of the CPU that it runs on.

A form is bound once, when an engine is loaded, and called every step; between the calls nothing is
decided. Values are activations in `CpuTarget.activation_dtype`, whatever the graph says: a CPU
without bf16 arithmetic is faster, and no less exact, in fp32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from kernels.cpu_jit import multiplies_bytes
from kernels.kv_cache import kv_format
from kernels.linear.layouts import LAYOUTS
from shared.ir import Graph, Node, WeightSpec


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight as it is stored: its spec, and its layout's tensors by role."""

    spec: WeightSpec
    tensors: Mapping[str, torch.Tensor]

    def dense(self) -> torch.Tensor:
        """The values that it stands for, fp32."""
        return LAYOUTS[self.spec.layout].unpack(self.tensors)


@dataclass(frozen=True, slots=True)
class CpuTarget:
    """What forms choose by.

    Args:
        activation_dtype: of values between ops.
        kv_dtype: of the KV cache; codes of 8 bits have scales beside them.
        has_fbgemm: fp16-packed matrix products exist (x86 with AVX2 and F16C).
        has_mkldnn: oneDNN matrix products exist.
        reason: why activations have their dtype, for people.
        has_vnni: vectors of 64 bytes are multiplied and summed up in one instruction (AVX512 VNNI).
    """

    activation_dtype: torch.dtype
    kv_dtype: torch.dtype
    has_fbgemm: bool
    has_mkldnn: bool
    reason: str
    has_vnni: bool = False

    @property
    def name(self) -> str:
        """The activations' dtype, as graphs spell it."""
        return str(self.activation_dtype).removeprefix("torch.")


class BoundOp(Protocol):
    """A node, bound to its weights: called with its inputs and the step's batch.

    Gives the output, or a tuple of them where the node has several; an effect is None.
    """

    def __call__(self, *inputs: Any) -> Any: ...


class BindCpu(Protocol):
    """A node's fast form for a CPU."""

    def __call__(
        self, node: Node, weights: Mapping[str, PackedWeight], target: CpuTarget
    ) -> BoundOp: ...


def cpu_target(graph: Graph) -> CpuTarget:
    """How `graph` runs on this machine's CPU."""
    wanted = getattr(torch, str(graph.config["dtype"]))
    has_bf16 = bool(torch.cpu._is_avx512_bf16_supported())
    activation = torch.float32 if wanted == torch.bfloat16 and not has_bf16 else wanted
    reason = (
        "as the engine says"
        if activation == wanted
        else "this CPU has no bf16 arithmetic, so activations are fp32"
    )
    return CpuTarget(
        activation_dtype=activation,
        kv_dtype=getattr(torch, kv_format(graph).dtype),
        has_fbgemm="fbgemm" in torch.backends.quantized.supported_engines,
        has_mkldnn=bool(torch._C._has_mkldnn),
        reason=reason,
        has_vnni=multiplies_bytes(),
    )
