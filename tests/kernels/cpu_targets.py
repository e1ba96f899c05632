"""CPUs to bind ops for, and an op run both ways: by its reference and by its fast form."""

from dataclasses import replace

import pytest
import torch

from kernels.batch import StepBatch
from kernels.cpu import bind_node
from kernels.cpu_form import CpuTarget, PackedWeight
from kernels.cpu_jit import multiplies_bytes
from kernels.linear.layouts import LAYOUTS
from kernels.ops import OPS
from shared.ir import Node, WeightSpec

HAS_VNNI = multiplies_bytes()
FP32 = CpuTarget(torch.float32, torch.float32, False, False, "")
TARGETS = {
    "fp32": FP32,
    "fp32 oneDNN": replace(FP32, has_mkldnn=bool(torch._C._has_mkldnn)),
    "fp32, bf16 cache, FBGEMM": CpuTarget(
        torch.float32, torch.bfloat16, "fbgemm" in torch.backends.quantized.supported_engines,
        bool(torch._C._has_mkldnn), "",
    ),
    "bf16": CpuTarget(
        torch.bfloat16, torch.bfloat16, False,
        bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()), "",
    ),
    "bf16, VNNI": CpuTarget(
        torch.bfloat16, torch.bfloat16, False,
        bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()), "", HAS_VNNI,
    ),
}  # fmt: skip
BY_TARGET = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)


def tolerance(target: CpuTarget) -> float:
    """Relative to values of about 1: half a dozen roundings of the narrowest dtype."""
    return 2e-5 if target.kv_dtype == torch.float32 else 0.04


def packed(weight: torch.Tensor, layout: str, dtype: str, group_size: int = 0) -> PackedWeight:
    """A weight as an engine holds it."""
    name = ("w",)
    spec = WeightSpec(tuple(weight.shape), name, (len(weight),), dtype, layout, group_size)
    return PackedWeight(spec, LAYOUTS[layout].pack(weight.to(getattr(torch, dtype)), group_size))


def ragged_batch(
    sequences: list[tuple[int, int]], kv_dtype: torch.dtype, *, scattered: bool, seed: int = 0
) -> StepBatch:
    """A step of (tokens cached before, tokens computed), over caches full of noise."""
    generator = torch.Generator().manual_seed(seed)
    block_tokens, num_blocks = 4, 200
    ids = torch.randperm(num_blocks, generator=generator) if scattered else torch.arange(num_blocks)
    blocks = [-(-(start + count) // block_tokens) for start, count in sequences]
    tables = torch.full((len(sequences), max(blocks) + 1), 7, dtype=torch.int32)
    positions, slots = [], []
    for row, (start, count) in enumerate(sequences):
        own = ids[sum(blocks[:row]) :][: blocks[row]]
        tables[row, : blocks[row]] = own
        at = torch.arange(start, start + count)
        positions.append(at)
        slots.append(own[at // block_tokens] * block_tokens + at % block_tokens)
    counts = [count for _, count in sequences]
    shape = (num_blocks, 2, block_tokens, 8)
    return StepBatch(
        positions_T=torch.cat(positions).int(),
        slot_mapping_T=torch.cat(slots).int(),
        block_tables_SB=tables,
        seq_lens_S=torch.tensor([sum(s) for s in sequences]).int(),
        query_start_S1=torch.tensor([0, *counts]).cumsum(0).int(),
        logit_rows_R=torch.tensor([len(torch.cat(positions)) - 1, 0]).int(),
        kv_caches=[
            (
                torch.randn(shape, generator=generator).to(kv_dtype),
                torch.randn(shape, generator=generator).to(kv_dtype),
            )
            for _ in range(2)
        ],
    )


def run_both(
    node: Node,
    inputs: list[torch.Tensor],
    weights: dict[str, PackedWeight],
    target: CpuTarget,
    batch: StepBatch,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Outputs of the reference, in fp64 from the same operands, and of the form."""
    dense = {role: weight.dense().double() for role, weight in weights.items()}
    twin = replace(
        batch,
        kv_caches=[(k.double(), v.double()) for k, v in batch.kv_caches],
        memo={},
    )
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    expected = OPS[node.op].reference(node, wide, dense, twin)
    found = bind_node(node, weights, target)(*[x.clone() for x in inputs], batch)
    batch.memo["reference_caches"] = twin.kv_caches
    return list(expected), list(found if isinstance(found, tuple) else [found])
