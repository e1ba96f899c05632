"""Times candidate tiles of the attention kernel from cubins: decode against the KV cache's bytes, over bf16 and e4m3,
with a long context among short ones too;
prompts against torch's attention; steps that mix both.

python -m bench.gpu_attention .gpu
"""

import argparse
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

from bench.gpu_kernels import (
    ATTENTION_MODELS,
    KV_BYTES,
    attention_shape,
    decode_attention_candidates,
    prefill_attention_candidates,
    read,
)  # fmt: skip
from bench.gpu_models import MODELS
from bench.gpu_timing import captured, median_ms
from kernels.attention.launch import (
    NEW,
    AttentionShape,
    AttentionTiles,
    grid,
    scratch,
    tile_queries,
    variant,
)
from kernels.attention.shares import Shares
from kernels.kv_cache import write
from kernels.launch import Sizes
from kernels.launcher import KernelLibrary

_BLOCK_TOKENS = 16
_TORCH_DTYPES = {"bf16": torch.bfloat16, "fp8e4nv": torch.float8_e4m3fn}
_LONG = 131_072
_DECODE = {
    **{
        f"{count} of {length}": [(1, length)] * count
        for count, length in (
            (1, 256), (1, 4096), (1, 32768), (4, 32768), (16, 700), (16, 8192), (64, 4096), (256, 700),
        )
    },
    **{
        f"{count} of 700, one of {_LONG}": [*[(1, 700)] * count, (1, _LONG)]
        for count in (15, 63, 255)
    },
}  # fmt: skip
_PROMPTS = ((4, 2048), (1, 8192))
# (query tokens, tokens) of each sequence: decode beside a chunk of a prompt.
_MIXED = {
    "255 of 700, chunk of 2,000": [(1, 700)] * 255 + [(2000, 2000)],
    "63 of 700, chunk of 450 at 1,350": [(1, 700)] * 63 + [(450, 1800)],
    f"62 of 700, one of {_LONG}, chunk of 450 at 1,350": [
        *[(1, 700)] * 62,
        (1, _LONG),
        (450, 1800),
    ],
    "five drafted at 4,000": [(5, 4000)],
    "five drafted at 2,000, 8 times": [(5, 2000)] * 8,
}
Step = list[tuple[int, int]]


def launcher(
    library: KernelLibrary, shape: AttentionShape, tiles: AttentionTiles, step: Step, layers: int
) -> Callable[[], None]:
    """A function that launches `layers` attentions of `step`, (query tokens, tokens) of each sequence, each on its own
    cache."""
    ints = {"dtype": torch.int32, "device": "cuda"}
    blocks = [-(-length // _BLOCK_TOKENS) for _, length in step]
    tables = torch.zeros(len(step), max(blocks), **ints)
    ids = torch.randperm(sum(blocks), device="cuda").int().split(blocks)
    for row, own in enumerate(ids):
        tables[row, : len(own)] = own
    starts = list(accumulate((queries for queries, _ in step), initial=0))
    sizes = Sizes(starts[-1], len(step), len(step))
    q = torch.randn(sizes.tokens, shape.num_heads * shape.head_dim, device="cuda").bfloat16()
    tensors = {
        "q": q, "out": torch.empty_like(q), "block_tables": tables,
        "seq_lens": torch.tensor([length for _, length in step], **ints),
        "query_start": torch.tensor(starts, **ints),
        "part_start": _part_start(shape, tiles, step),
    }  # fmt: skip
    for name in NEW:
        width = shape.num_kv_heads * shape.head_dim
        tensors[name] = torch.randn(sizes.tokens, width, device="cuda").bfloat16()
    for request in scratch(shape, tiles):
        name = {"attention_max": "partial_max", "attention_sum": "partial_sum"}.get(
            request.name, request.name.removeprefix("attention_")
        )
        tensors[name] = torch.zeros(request.num_bytes(sizes), dtype=torch.uint8, device="cuda")
    caches = [_cache(shape, sum(blocks)) for _ in range(layers)]
    which = variant(shape, library.arch, tiles)
    kernel = library.kernel(which)
    names = [a.name for a in which.arguments]

    def run() -> None:
        at = {name: t.data_ptr() for name, t in tensors.items()}
        at |= {"num_sequences": len(step), "table_stride": tables.stride(0)}
        for cache in caches:
            parts = ("k_cache", "v_cache", "k_scale", "v_scale")
            here = at | {name: part.data_ptr() for name, part in zip(parts, cache, strict=False)}
            kernel(grid(shape, tiles, sizes), *(here[name] for name in names))

    return run


def _part_start(shape: AttentionShape, tiles: AttentionTiles, step: Step) -> torch.Tensor:
    """Where each sequence's further parts begin."""
    counts, ends = np.array(step, np.int32).T
    shares = Shares(max(tiles.extra, 1), tile_queries(shape))
    return torch.tensor([0, *shares.further_parts(counts, ends).cumsum()]).int().cuda()


def _cache(shape: AttentionShape, num_blocks: int) -> tuple[torch.Tensor, ...]:
    values = (num_blocks, shape.num_kv_heads, _BLOCK_TOKENS, shape.head_dim)
    dtype = _TORCH_DTYPES[shape.kv_dtype]
    if not shape.is_scaled:
        return tuple(torch.randn(values, dtype=dtype, device="cuda") for _ in "kv")
    parts = [torch.empty(values, dtype=dtype, device="cuda") for _ in "kv"]
    cache = (*parts, *(torch.empty(values[:-1], device="cuda") for _ in "kv"))
    for slots in torch.arange(num_blocks * _BLOCK_TOKENS, device="cuda").split(1 << 16):
        rows = torch.randn(2, len(slots), shape.num_kv_heads * shape.head_dim, device="cuda")
        write(cache, slots, rows[0], rows[1])
    return cache


def _ranked(
    library: KernelLibrary, shape: AttentionShape, candidates: list[AttentionTiles], step: Step, layers: int
) -> list[tuple[float, AttentionTiles]]:  # fmt: skip
    """Milliseconds of one layer with each of the tiles, the fastest first."""
    seen = []
    for tiles in candidates:
        run = launcher(library, shape, tiles, step, layers)
        seen.append((median_ms(captured(run, 1).replay, 9) / layers, tiles))
    return sorted(seen, key=lambda item: item[0])


def _decode(library: KernelLibrary, model: str) -> None:
    for label, step in _DECODE.items():
        keys = sum(length for _, length in step)
        for kv_dtype, (value_bytes, scale_bytes) in KV_BYTES.items():
            shape = attention_shape(MODELS[model], kv_dtype)
            head_bytes = shape.head_dim * value_bytes + scale_bytes
            moved = 2 * keys * shape.num_kv_heads * head_bytes
            candidates = list(decode_attention_candidates(shape, len(step)))
            layers = max(1, min(32, (2 << 30) // moved))
            seen = _ranked(library, shape, candidates, step, layers)
            best = " | ".join(
                f"{ms * 1e3:.1f} us {moved / ms / 1e9:.2f} TB/s n{t.block_n} w{t.num_warps} s{t.stages}"
                f"{' early' if t.is_early else ''}"
                for ms, t in seen[:3]
            )
            print(f"{model} decode {label} {kv_dtype}: {best}", flush=True)


def _prompts(library: KernelLibrary, model: str) -> None:
    for num_sequences, length in _PROMPTS:
        shape = attention_shape(MODELS[model])
        flops = 2 * num_sequences * shape.num_heads * length * length * shape.head_dim
        heads = (num_sequences, shape.num_heads, length, shape.head_dim)
        q = torch.randn(heads, dtype=torch.bfloat16, device="cuda")
        k = q[:, : shape.num_kv_heads].contiguous()
        flash = median_ms(
            lambda q=q, k=k: torch.nn.functional.scaled_dot_product_attention(
                q, k, k, is_causal=True, enable_gqa=True
            ), 9,
        )  # type: ignore[misc]  # fmt: skip
        print(f"{model} prompts {num_sequences}x{length}: torch {flops / flash / 1e9:.0f} TFLOP/s")
        for kv_dtype in KV_BYTES:
            kept = attention_shape(MODELS[model], kv_dtype)
            step = [(length, length)] * num_sequences
            seen = _ranked(library, kept, list(prefill_attention_candidates(kept)), step, 1)
            best = " | ".join(
                f"{flops / ms / 1e9:.0f} q{t.block_q} n{t.block_n} w{t.num_warps} s{t.stages}"
                for ms, t in seen[:4]
            )
            print(f"  {kv_dtype}: {best}", flush=True)


def _mixed(library: KernelLibrary, model: str) -> None:
    shape = attention_shape(MODELS[model])
    for label, step in _MIXED.items():
        seen = _ranked(library, shape, list(prefill_attention_candidates(shape)), step, 4)
        best = " | ".join(
            f"{ms * 1e3:.0f} us q{t.block_q} n{t.block_n} w{t.num_warps} s{t.stages}"
            for ms, t in seen[:4]
        )
        print(f"{model} mixed {label}: {best}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arch", default="sm_90")
    options = parser.parse_args()
    library = read(options.folder, f"{options.arch}.attention")
    for model in ATTENTION_MODELS:
        _decode(library, model)
        _prompts(library, model)
        _mixed(library, model)


if __name__ == "__main__":
    main()
