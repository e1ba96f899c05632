"""Compiles the kernels that the GPU benchmarks launch, on a machine without a GPU, into a folder.

python -m bench.gpu_kernels .gpu --arch sm_90 --tune
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from bench.gpu_models import MODELS, LlamaSizes, llama_graph
from kernels.aot import CODE_TITLE, INDEX_TITLE, compile_variants, pack_kernels
from kernels.launcher import KernelLibrary
from kernels.linear.launch import LinearShape, Tiles, few_tokens, one_token
from kernels.lowering import variants
from kernels.sampling.launch import greedy_variant
from kernels.variant import KernelVariant
from shared.arch import Arch, arch_named

LAYOUTS = {"bf16": "plain", "fp8": "fp8_channel"}


def linear_shapes(sizes: LlamaSizes, layout: str) -> dict[str, LinearShape]:
    """The five linears of a decode step, as fused."""
    s = sizes
    norm = {"has_norm": True, "eps": 1e-5}
    shapes = {
        "qkv": LinearShape((s.heads + 2 * s.kv_heads) * s.head_dim, s.hidden, "bf16", "bf16", epilogue="rope",
                           num_heads=s.heads, num_kv_heads=s.kv_heads, head_dim=s.head_dim, **norm),
        "o": LinearShape(s.hidden, s.heads * s.head_dim, "bf16", "bf16", has_residual=True),
        "gate_up": LinearShape(2 * s.ffn, s.hidden, "bf16", "bf16", epilogue="silu_mul", **norm),
        "down": LinearShape(s.hidden, s.ffn, "bf16", "bf16", has_residual=True),
    }  # fmt: skip
    shapes = {name: replace(shape, layout=layout) for name, shape in shapes.items()}
    if layout == "plain":
        shapes["head"] = LinearShape(s.vocab, s.hidden, "bf16", "fp32", has_rows=True, **norm)
    return shapes


def one_token_candidates(shape: LinearShape) -> Iterator[Tiles]:
    """Tiles worth timing for one token."""
    width = 1 if shape.epilogue == "plain" else 2
    for block_k, num_warps in ((512, 2), (1024, 2), (1024, 4), (2048, 4), (2048, 8), (512, 4), (4096, 8)):
        for block_n in (1, 2, 4, 8):
            per_thread = width * block_n * block_k // (32 * num_warps)
            if shape.k % block_k or not 16 <= per_thread <= 64:
                continue
            for prefetch in (1, 2):
                yield Tiles(block_n, block_k, num_warps, prefetch)


def few_tokens_candidates(shape: LinearShape) -> Iterator[Tiles]:
    """Tiles worth timing for a tile of tokens."""
    for block_n in (16, 32, 64):
        for block_k, stages, num_warps in ((64, 5, 4), (128, 4, 4), (256, 3, 4), (256, 3, 8), (128, 6, 4)):
            element = 2 if shape.layout == "plain" else 1
            width = 1 if shape.epilogue == "plain" else 2
            if width * block_n * block_k * element * stages <= 110_000:
                yield Tiles(block_n, block_k, num_warps, 1, stages)


def tuning_variants(arch: Arch) -> Iterator[KernelVariant]:
    """Every candidate of every linear of the 8B model."""
    for layout in LAYOUTS.values():
        for shape in linear_shapes(MODELS["llama-3.1-8b"], layout).values():
            for tiles in one_token_candidates(shape):
                yield one_token(shape, arch, tiles)
            for tiles in few_tokens_candidates(shape):
                yield few_tokens(shape, arch, tiles, 16)


def model_variants(arch: Arch, names: list[str]) -> Iterator[KernelVariant]:
    """Every variant of every benchmark model."""
    for name in names:
        for layout in LAYOUTS.values():
            yield from variants(llama_graph(MODELS[name], layout, num_layers=1), arch)
        yield greedy_variant(MODELS[name].vocab, 16, arch)


def write(folder: Path, name: str, kernels: list[tuple[str, bytes]]) -> None:
    """The two kernel layers as files."""
    folder.mkdir(exist_ok=True)
    for title, content in kernels:
        (folder / f"{name}.{Path(title).name}").write_bytes(content)


def read(folder: Path, name: str) -> KernelLibrary:
    """The library that `write` wrote, on the current device."""
    code = (folder / f"{name}.{Path(CODE_TITLE).name}").read_bytes()
    index = (folder / f"{name}.{Path(INDEX_TITLE).name}").read_bytes()
    return KernelLibrary(index, lambda offset, size: code[offset : offset + size])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--tune", action="store_true")
    options = parser.parse_args()
    arch = arch_named(options.arch)
    jobs = {"models": model_variants(arch, options.models.split(","))}
    if options.tune:
        jobs = {"tune": tuning_variants(arch)}
    for name, wanted in jobs.items():
        start = time.perf_counter()
        kernels = compile_variants(wanted, arch)
        write(options.folder, f"{arch.name}.{name}", pack_kernels(kernels, arch))
        print(f"{name}: {len(kernels)} kernels in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
