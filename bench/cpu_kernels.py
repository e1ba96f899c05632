"""CPU kernels beside their alternatives, in CPU time of one thread: the least of several, in turns.

    OMP_NUM_THREADS=1 python -m bench.cpu_kernels

Prints a JSON line a case, microseconds. `linear`: int8 weights times activations of two bytes (`int8`) and of one
(`w8a8`), both where the CPU multiplies bytes (VNNI), `int8` as a CPU without VNNI multiplies it, and bf16; up to 16
rows 30 weights in turn, so that they come from memory. `prompt_attention`: our kernel from the cache's blocks, and
torch's over dense keys and values. Shapes are SmolLM2-135M's.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch.nn.functional import scaled_dot_product_attention

from kernels.cpu import bind_node
from kernels.cpu_form import CpuTarget, PackedWeight
from kernels.cpu_jit import multiplies_bytes, set_num_threads
from kernels.linear.cpu import bind
from kernels.linear.layouts import LAYOUTS
from kernels.reference import prompt_batch
from shared.ir import Graph, Node, TensorSpec, WeightSpec

SHAPES = ((3072, 576), (576, 1536), (576, 576))
PROMPT, HEADS, KV_HEADS, HEAD_DIM = 512, 9, 3, 64
BF16 = torch.bfloat16
BYTES = CpuTarget(BF16, BF16, False, True, "", has_vnni=multiplies_bytes())

Run = Callable[[], object]


def least_us(runs: Mapping[str, Run], rounds: int = 9) -> dict[str, float]:
    """CPU time of each, microseconds."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            start_s = time.process_time()
            run()
            times[name].append((time.process_time() - start_s) * 1e6)
    return {name: round(min(found)) for name, found in times.items()}


def linear(num_rows: int, num_columns: int) -> None:
    """Weights [num_rows, num_columns] times few and many rows."""
    spec = WeightSpec((num_rows, num_columns), ("w",), (num_rows,), "bfloat16", "int8_channel", 0)
    weights = [
        PackedWeight(spec, LAYOUTS["int8_channel"].pack(torch.randn(spec.shape), 0))
        for _ in range(30)
    ]
    dense = [
        PackedWeight(replace(spec, layout="plain"), {"weight": weight.dense().bfloat16()})
        for weight in weights
    ]
    node = Node("linear", (), ("y",))
    rounded = replace(node, attrs={"activations": "int8"})
    without = replace(BYTES, has_vnni=False)
    batch = prompt_batch(_graph(), [1])
    forms = {
        "int8": [bind(node, {"weight": weight}, BYTES) for weight in weights],
        "w8a8": [bind(rounded, {"weight": weight}, BYTES) for weight in weights],
        "int8_without_vnni": [bind(node, {"weight": weight}, without) for weight in weights],
        "bf16": [bind(node, {"weight": weight}, BYTES) for weight in dense],
    }
    for tokens in (1, 2, 4, 8, 16, 64, PROMPT):
        x = torch.randn(tokens, num_columns).to(BF16)
        count = len(weights) if tokens <= 16 else 1
        found = least_us(
            {
                name: lambda bound=bound[:count], x=x: [form(x, batch) for form in bound]
                for name, bound in forms.items()
            }
        )
        each = {name: round(us / count) for name, us in found.items()}
        print(json.dumps({"case": "linear", "rows": tokens, "weight": spec.shape, **each}))


def prompt_attention() -> None:
    """A layer's causal attention over a prompt."""
    batch = prompt_batch(_graph(), [PROMPT], BF16)
    for part in batch.kv_caches[0]:
        part.normal_()
    sizes = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
    how = {"layer": 0, "scale": HEAD_DIM**-0.5, "window": 0, "soft_cap": 0.0}
    form = bind_node(Node("attention", ("q", "kv"), ("y",), attrs={**sizes, **how}), {}, BYTES)
    q_TN = torch.randn(PROMPT, HEADS * HEAD_DIM).to(BF16)
    q = q_TN.view(PROMPT, HEADS, HEAD_DIM).transpose(0, 1)[None]
    k, v = (part.transpose(0, 1).flatten(1, 2)[None] for part in batch.kv_caches[0])

    def torchs(dtype: torch.dtype) -> torch.Tensor:
        repeated = (x.to(dtype).repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
        return scaled_dot_product_attention(q.to(dtype), *repeated, is_causal=True).to(BF16)

    found = least_us(
        {
            "ours": lambda: form(q_TN, None, batch),
            "torch_bf16": lambda: torchs(BF16),
            "torch_fp32": lambda: torchs(torch.float32),
        }
    )
    print(json.dumps({"case": "prompt_attention", "tokens": PROMPT, **found}))


def _graph() -> Graph:
    config = {"dtype": "bfloat16", "num_layers": 1, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
    return Graph({"token_ids": TensorSpec(("T",), "int32")}, (), {}, (), config)  # type: ignore[arg-type]


def main() -> None:
    """Measures every case."""
    set_num_threads(torch.get_num_threads())
    for shape in SHAPES:
        linear(*shape)
    prompt_attention()


if __name__ == "__main__":
    main()
