"""What the CPU kernels give, to the last bit: a program whose processes are compared.

    python -m tests.kernels.cpu_kernel_bits CASE...

Prints a line a case, in the order asked: its name and a digest of its outputs.
"""

import hashlib
import sys
from collections.abc import Callable

import torch

from kernels.batch import StepBatch
from kernels.cpu import bind_node
from kernels.cpu_form import CpuTarget, PackedWeight
from kernels.linear.layouts import LAYOUTS
from shared.ir import Attr, Node, WeightSpec

FP32 = CpuTarget(torch.float32, torch.float32, False, False, "")
HEADS: dict[str, Attr] = {"layer": 0, "num_heads": 6, "num_kv_heads": 2, "head_dim": 64}
BLOCK_TOKENS, NUM_TOKENS, M = 16, 90, 576


def norms(has_residual: bool) -> list[torch.Tensor]:
    """Of one row, and of many: a kernel has a way of its own for one."""
    attrs: dict[str, Attr] = {"eps": 1e-5, "residual": has_residual, "head_dim": 0}
    outputs = ("y", "sum")[: 1 + has_residual]
    run = bind_node(Node("rms_norm", (), outputs, attrs=attrs), {"weight": _gain(M)}, FP32)
    inputs = [_noise(NUM_TOKENS, M) for _ in outputs]
    found = [run(*(x[:rows] for x in inputs), _batch(1, 0)) for rows in (1, NUM_TOKENS)]
    return [y for some in found for y in (some if isinstance(some, tuple) else (some,))]


def rope(kv_dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """q, and the cache that k and v went to: as codes of a dtype, and scales, where one is named."""
    attrs: dict[str, Attr] = {
        **HEADS, "inv_freq": tuple(0.8**i for i in range(32)), "attention_scaling": 1.0, "eps": 1e-6,
    }  # fmt: skip
    batch, weights = _batch(NUM_TOKENS, 0), {role: _gain(64) for role in ("q_norm", "k_norm")}
    if kv_dtype is not None:
        values = batch.kv_caches[0]
        scales = (torch.zeros(part.shape[:-1]) for part in values)
        batch.kv_caches = [(*(torch.zeros_like(part, dtype=kv_dtype) for part in values), *scales)]
    run = bind_node(Node("qkv_rope_write", (), ("q", "kv"), attrs=attrs), weights, FP32)
    q, _ = run(_noise(NUM_TOKENS, 10 * 64), batch)
    return [q, *batch.kv_caches[0]]


def attention(num_queries: int) -> list[torch.Tensor]:
    """Of the last queries of a sequence, which see all before them."""
    attrs: dict[str, Attr] = {**HEADS, "scale": 0.125, "window": 0, "soft_cap": 0.0}
    run = bind_node(Node("attention", (), ("y",), attrs=attrs), {}, FP32)
    q, batch = _noise(num_queries, 6 * 64), _batch(num_queries, NUM_TOKENS)
    return [run(q, torch.empty(0), batch)]


def gated() -> list[torch.Tensor]:
    """Of one row, and of many."""
    run = bind_node(Node("silu_mul", (), ("y",)), {}, FP32)
    x = _noise(NUM_TOKENS, 2 * M)
    return [run(x[:rows], _batch(1, 0)) for rows in (1, NUM_TOKENS)]


CASES: dict[str, Callable[[], list[torch.Tensor]]] = {
    "norm": lambda: norms(False),
    "norm_of_sum": lambda: norms(True),
    "rope": rope,
    "rope_int8": lambda: rope(torch.int8),
    "rope_fp8": lambda: rope(torch.float8_e4m3fn),
    "many_queries": lambda: attention(NUM_TOKENS),
    "one_query": lambda: attention(1),
    "gated": gated,
}


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _gain(size: int) -> PackedWeight:
    spec = WeightSpec((size,), ("w",), (size,), "float32", "plain")
    return PackedWeight(spec, LAYOUTS["plain"].pack(_noise(size).abs() + 0.5, 0))


def _batch(count: int, cached: int) -> StepBatch:
    """One sequence, and a cache of noise."""
    at = torch.arange(cached, cached + count).int()
    shape = (16, 2, BLOCK_TOKENS, 64)
    return StepBatch(
        positions_T=at,
        slot_mapping_T=at,
        block_tables_SB=torch.arange(16).int()[None],
        seq_lens_S=torch.tensor([cached + count]).int(),
        query_start_S1=torch.tensor([0, count]).int(),
        logit_rows_R=torch.tensor([count - 1]).int(),
        kv_caches=[(_noise(*shape), _noise(*shape).flip(0).contiguous())],
    )


def main() -> None:
    """Runs the cases that the command line names."""
    for name in sys.argv[1:]:
        digest = hashlib.sha256()
        for output in CASES[name]():
            digest.update(output.view(torch.uint8).numpy().tobytes())
        print(name, digest.hexdigest())  # noqa: T201


if __name__ == "__main__":
    main()
