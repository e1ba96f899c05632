"""Times candidate tiles of the attention kernel from cubins: decode against the KV cache's bytes, prompts against
FlashAttention through torch.

python -m bench.gpu_attention .gpu
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from bench.gpu_kernels import (
    attention_shape,
    decode_attention_candidates,
    prefill_attention_candidates,
    read,
)  # fmt: skip
from bench.gpu_models import MODELS
from bench.gpu_timing import captured, median_ms
from kernels.attention.launch import AttentionShape, AttentionTiles, grid, scratch, variant
from kernels.launch import Sizes
from kernels.launcher import KernelLibrary

_BLOCK_TOKENS = 16


def launcher(
    library: KernelLibrary, shape: AttentionShape, tiles: AttentionTiles, num_sequences: int,
    queries: int, length: int, layers: int,
) -> Callable[[], None]:  # fmt: skip
    """A function that launches `layers` attentions of equal sequences, each on its own cache."""
    blocks = -(-length // _BLOCK_TOKENS)
    ints = {"dtype": torch.int32, "device": "cuda"}
    cache = (num_sequences * blocks, _BLOCK_TOKENS, shape.num_kv_heads, shape.head_dim)
    caches = [
        [torch.randn(cache, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
        for _ in range(layers)
    ]
    sizes = Sizes(num_sequences * queries, num_sequences, num_sequences)
    q = torch.randn(
        sizes.tokens, shape.num_heads * shape.head_dim, dtype=torch.bfloat16, device="cuda"
    )
    tensors = {
        "q": q, "out": torch.empty_like(q),
        "block_tables": torch.randperm(num_sequences * blocks, device="cuda").int().view(num_sequences, -1),
        "seq_lens": torch.full((num_sequences,), length, **ints),
        "query_start": torch.arange(num_sequences + 1, **ints) * queries,
    }  # fmt: skip
    for request in scratch(shape, tiles):
        name = {"attention_max": "partial_max", "attention_sum": "partial_sum"}.get(
            request.name, request.name.removeprefix("attention_")
        )
        tensors[name] = torch.zeros(request.num_bytes(sizes), dtype=torch.uint8, device="cuda")
    which = variant(shape, library.arch, tiles)
    kernel = library.kernel(which)
    names = [a.name for a in which.arguments]

    def run() -> None:
        at = {name: t.data_ptr() for name, t in tensors.items()}
        at |= {"num_sequences": num_sequences, "table_stride": blocks}
        for k_cache, v_cache in caches:
            here = at | {"k_cache": k_cache.data_ptr(), "v_cache": v_cache.data_ptr()}
            kernel(grid(shape, tiles, sizes), *(here[name] for name in names))

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arch", default="sm_90")
    options = parser.parse_args()
    library = read(options.folder, f"{options.arch}.attention")
    shape = attention_shape(MODELS["llama-3.1-8b"])
    for num_sequences, length in ((1, 256), (1, 4096), (16, 700), (256, 700)):
        seen = []
        layers = 32 if num_sequences == 1 else 4
        for tiles in decode_attention_candidates(num_sequences):
            run = launcher(library, shape, tiles, num_sequences, 1, length, layers)
            ms = median_ms(captured(run, 1).replay, 9) / layers
            seen.append((ms, tiles))
        seen.sort(key=lambda item: item[0])
        moved = 2 * num_sequences * length * shape.num_kv_heads * shape.head_dim * 2
        best = " | ".join(
            f"{ms * 1e3:.1f} us {moved / ms / 1e9:.2f} TB/s n{t.block_n} x{t.splits} w{t.num_warps} s{t.stages}"
            for ms, t in seen[:4]
        )
        print(
            f"decode S={num_sequences} len={length}: {best} | worst {seen[-1][0] * 1e3:.1f} us",
            flush=True,
        )
    for num_sequences, length in ((4, 2048), (1, 8192)):
        flops = 2 * num_sequences * shape.num_heads * length * length * shape.head_dim
        seen = []
        for tiles in prefill_attention_candidates(shape):
            run = launcher(library, shape, tiles, num_sequences, length, length, 1)
            seen.append((median_ms(captured(run, 1).replay, 9), tiles))
        seen.sort(key=lambda item: item[0])
        q = torch.randn(num_sequences, 32, length, 128, dtype=torch.bfloat16, device="cuda")
        k = torch.randn(num_sequences, 8, length, 128, dtype=torch.bfloat16, device="cuda")
        flash = median_ms(
            lambda q=q, k=k: torch.nn.functional.scaled_dot_product_attention(
                q, k, k, is_causal=True, enable_gqa=True
            ), 9,
        )  # type: ignore[misc]  # fmt: skip
        best = " | ".join(
            f"{flops / ms / 1e9:.0f} TFLOP/s q{t.block_q} n{t.block_n} w{t.num_warps} s{t.stages}"
            for ms, t in seen[:4]
        )
        print(
            f"prefill {num_sequences}x{length}: {best} | torch {flops / flash / 1e9:.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
