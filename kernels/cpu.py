"""The ops' fast CPU forms, a row each; an op without one runs as its reference."""

from collections.abc import Mapping
from typing import Any

from kernels.attention.cpu import bind as bind_attention
from kernels.cpu_form import BindCpu, BoundOp, CpuTarget, PackedWeight
from kernels.embedding.cpu import bind as bind_embedding
from kernels.linear.cpu import bind as bind_linear
from kernels.ops import OPS
from kernels.qkv_rope_write.cpu import bind as bind_qkv_rope_write
from kernels.rms_norm.cpu import bind as bind_rms_norm
from kernels.select_rows.cpu import bind as bind_select_rows
from kernels.silu_mul.cpu import bind as bind_silu_mul
from shared.ir import Node

CPU_FORMS: dict[str, BindCpu] = {
    "embedding": bind_embedding,
    "rms_norm": bind_rms_norm,
    "linear": bind_linear,
    "qkv_rope_write": bind_qkv_rope_write,
    "attention": bind_attention,
    "silu_mul": bind_silu_mul,
    "select_rows": bind_select_rows,
}


def bind_node(node: Node, weights: Mapping[str, PackedWeight], target: CpuTarget) -> BoundOp:
    """`node`, ready to run on this CPU."""
    form = CPU_FORMS.get(node.op)
    return form(node, weights, target) if form else _bind_reference(node, weights)


def _bind_reference(node: Node, weights: Mapping[str, PackedWeight]) -> BoundOp:
    reference = OPS[node.op].reference
    dense = {role: weight.dense() for role, weight in weights.items()}
    is_single = len(node.outputs) == 1

    def run(*inputs: Any) -> Any:
        outputs = reference(node, inputs[:-1], dense, inputs[-1])
        return outputs[0] if is_single else outputs

    return run
