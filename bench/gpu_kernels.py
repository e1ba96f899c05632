"""Compiles the kernels that the GPU benchmarks launch, on a machine without a GPU, into a folder.

python -m bench.gpu_kernels .gpu --arch sm_90 --tune
"""

import argparse
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from bench.gpu_models import MODELS, QUANTS, LlamaSizes, quantized_graph
from bench.gpu_timing import require_gpu
from kernels.aot import compile_variants, pack_kernels
from kernels.attention import launch as attention
from kernels.attention.launch import AttentionShape, AttentionTiles
from kernels.launcher import KernelLibrary
from kernels.linear.launch import LinearShape, Tiles, few_tokens, one_token
from kernels.linear.tiles import one_token_tiles
from kernels.lowering import variants
from kernels.regimes import BLOCK_TOKENS
from kernels.sampling import launch as sampling
from kernels.step_inputs import launch as step_inputs
from kernels.variant import CODE_TITLE, INDEX_TITLE, KernelVariant
from shared.arch import Arch, arch_named

SAMPLING_VOCAB = MODELS["llama-3.1-8b"].vocab
TUNED_LAYOUTS = ("plain", "fp8_channel")
TUNED_MODELS = ("llama-3.1-8b", "qwen2.5-1.5b")
ATTENTION_MODELS = ("llama-3.1-8b", "llama-3.2-1b")
# Bytes of a value and of a head's scale in a cache.
KV_BYTES = {"bf16": (2, 0), "fp8e4nv": (1, 4)}


def linear_shapes(sizes: LlamaSizes, layout: str) -> dict[str, LinearShape]:
    """The five linears of a decode step, as fused."""
    s = sizes
    norm = {"num_squares": 64, "eps": 1e-5}
    shapes = {
        "qkv": LinearShape((s.heads + 2 * s.kv_heads) * s.head_dim, s.hidden, "bf16", "bf16", epilogue="rope",
                           num_heads=s.heads, num_kv_heads=s.kv_heads, head_dim=s.head_dim,
                           block_tokens=BLOCK_TOKENS, **norm),
        "o": LinearShape(s.hidden, s.heads * s.head_dim, "bf16", "bf16", has_residual=True, has_gain=True),
        "gate_up": LinearShape(2 * s.ffn, s.hidden, "bf16", "bf16", epilogue="silu_mul", **norm),
        "down": LinearShape(s.hidden, s.ffn, "bf16", "bf16", has_residual=True, has_gain=True),
    }  # fmt: skip
    shapes = {name: replace(shape, layout=layout) for name, shape in shapes.items()}
    if layout == "plain":
        shapes["head"] = LinearShape(s.vocab, s.hidden, "bf16", "fp32", has_rows=True, **norm)
    return shapes


def one_token_candidates(shape: LinearShape, arch: Arch) -> Iterator[Tiles]:
    """Tiles worth timing for one token, the built-in ones first."""
    yield one_token_tiles(shape, arch)
    width = 1 if shape.epilogue == "plain" else 2
    bf16 = (
        (1, 2048, 4),
        (1, 1024, 2),
        (2, 512, 2),
        (2, 2048, 8),
        (2, 4096, 8),
        (1, 2048, 8),
        (4, 1024, 2),
        (8, 512, 2),
        (4, 2048, 4),
        (2, 1024, 4),
    )
    fp8 = ((2, 4096, 8), (4, 1024, 2), (8, 512, 2), (4, 512, 2), (8, 1024, 4), (4, 2048, 4), (2, 2048, 4),
           (1, 4096, 8), (4, 4096, 8))  # fmt: skip
    for block_n, block_k, num_warps in bf16 if shape.layout == "plain" else fp8:
        per_thread = width * block_n * block_k // (32 * num_warps)
        if shape.k % block_k or not 16 <= per_thread <= 128:
            continue
        for vector in (0,) if shape.layout == "plain" else (0, 8):
            for prefetch in (1,) if shape.k == block_k else (1, 2):
                yield Tiles(block_n, block_k, num_warps, prefetch, vector=vector)


def few_tokens_candidates(shape: LinearShape) -> Iterator[Tiles]:
    """Tiles worth timing for a tile of tokens."""
    element = 2 if shape.layout == "plain" else 1
    width = 1 if shape.epilogue == "plain" else 2
    splits = (1, 2, 4) if shape.n < 10_000 else (1,)
    for block_k, stages in ((64, 5), (64, 8), (128, 4), (128, 6), (256, 3), (256, 4)):
        size = (width * 64 * element + 32) * block_k * stages
        if not 30_000 <= size <= 200_000:
            continue
        for split in splits:
            if (split - 1) * -(-shape.k // (split * block_k)) * block_k >= shape.k:
                continue  # the last part would be empty
            for prefetch in (0, 1):
                yield Tiles(64, block_k, 4, prefetch, stages, split)


def attention_shape(sizes: LlamaSizes, kv_dtype: str = "bf16") -> AttentionShape:
    """A model's attention, as its graph asks for it; `kv_dtype` as `AttentionShape` has it."""
    return AttentionShape(
        sizes.heads,
        sizes.kv_heads,
        sizes.head_dim,
        sizes.head_dim**-0.5,
        0,
        0.0,
        "bf16",
        kv_dtype,
        16,
    )


def decode_attention_candidates(
    shape: AttentionShape, num_sequences: int
) -> Iterator[AttentionTiles]:
    """Tiles worth timing where each sequence has one query; as many programs for further parts as engines have."""
    if num_sequences == 1:
        for block_n, warps in ((64, 2), (64, 4), (128, 4), (128, 8), (256, 8)):
            for extra in (15, 31):
                yield AttentionTiles(
                    1, block_n, extra, warps, min_part=block_n, is_decode=True, is_lone=True,
                    is_early=True,
                )  # fmt: skip
        return
    for block_n, warps, stages in ((64, 2, 3), (64, 2, 4), (32, 1, 4), (64, 4, 2), (128, 4, 2)):
        for is_early in (False, True):
            extra = attention.further_programs(shape)
            yield AttentionTiles(
                1, block_n, extra, warps, stages, is_decode=True, is_early=is_early
            )


def prefill_attention_candidates(shape: AttentionShape) -> Iterator[AttentionTiles]:
    """Tiles worth timing for prompts; over codes, for sequences with several queries alone, as engines launch them."""
    for rows, block_n, warps, stages in (
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (64, 32, 4, 3),
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (128, 128, 8, 3),
        (128, 64, 4, 3),
        (128, 32, 4, 3),
    ):
        extra = 0 if shape.is_scaled else attention.further_programs(shape)
        tiles = AttentionTiles(rows // shape.group, block_n, extra, warps, stages, min_part=256)
        yield replace(tiles, takes="several", reads_new=True) if shape.is_scaled else tiles


def attention_variants(arch: Arch) -> Iterator[KernelVariant]:
    """Every attention candidate of both Llamas, over a plain cache and one of e4m3."""
    for name in ATTENTION_MODELS:
        for kv_dtype in KV_BYTES:
            shape = attention_shape(MODELS[name], kv_dtype)
            for num_sequences in (1, 16, 256):
                for tiles in decode_attention_candidates(shape, num_sequences):
                    yield attention.variant(shape, arch, tiles)
            for tiles in prefill_attention_candidates(shape):
                yield attention.variant(shape, arch, tiles)


def tuning_variants(arch: Arch) -> Iterator[KernelVariant]:
    """Every candidate of every linear of TUNED_MODELS."""
    for name in TUNED_MODELS:
        for layout in TUNED_LAYOUTS:
            for shape in linear_shapes(MODELS[name], layout).values():
                for tiles in one_token_candidates(shape, arch):
                    yield one_token(shape, arch, tiles)
                for tiles in few_tokens_candidates(shape):
                    yield few_tokens(shape, arch, tiles, 16)


def model_variants(
    arch: Arch, names: list[str], quants: list[str], kv_caches: list[str], *,
    with_candidates: bool = False,
) -> Iterator[KernelVariant]:  # fmt: skip
    """Every variant of every benchmark model in every quantization, over every KV cache."""
    for name in names:
        for quant in quants:
            for kv_cache in kv_caches:
                graph = quantized_graph(MODELS[name], quant, 2, kv_cache=kv_cache)
                yield from variants(graph, arch, with_candidates=with_candidates)
        yield sampling.greedy_variant(MODELS[name].vocab, 16, arch)


def sampling_variants() -> set[KernelVariant]:
    """What `bench.gpu_sampling` launches."""
    return sampling.variants(SAMPLING_VOCAB) | step_inputs.variants(16)


def write(folder: Path, name: str, kernels: list[tuple[str, bytes]]) -> None:
    """The two kernel layers as files."""
    folder.mkdir(exist_ok=True)
    for title, content in kernels:
        (folder / f"{name}.{Path(title).name}").write_bytes(content)


def read(folder: Path, name: str) -> KernelLibrary:
    """The library that `write` wrote, on the current device.

    Raises:
        SystemExit: it was not written, or there is no GPU.
    """
    paths = [folder / f"{name}.{Path(title).name}" for title in (CODE_TITLE, INDEX_TITLE)]
    for path in paths:
        if not path.is_file():
            raise SystemExit(f"{path} is not there: python -m bench.gpu_kernels {folder} makes it")
    require_gpu()
    code, index = (path.read_bytes() for path in paths)
    return KernelLibrary(index, lambda offset, size: code[offset : offset + size])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--quants", default=",".join(QUANTS))
    parser.add_argument(
        "--kv-caches", default=",fp8", help="of models: fp8, int8, nothing for the dtype of x"
    )
    parser.add_argument("--tune", action="store_true")
    parser.add_argument(
        "--candidates", action="store_true", help="of models: also what tuning tables may name"
    )
    parser.add_argument("--only", help="one library: models, sampling, tune or attention")
    options = parser.parse_args()
    arch = arch_named(options.arch)
    jobs: dict[str, Iterable[KernelVariant]] = {
        "models": model_variants(
            arch,
            options.models.split(","),
            options.quants.split(","),
            options.kv_caches.split(","),
            with_candidates=options.candidates,
        ),
        "sampling": sampling_variants(),
    }
    if options.tune:
        jobs = {"tune": tuning_variants(arch), "attention": attention_variants(arch)}
    for name, wanted in jobs.items():
        if options.only and name != options.only:
            continue
        start = time.perf_counter()
        kernels = compile_variants(wanted, arch)
        write(options.folder, f"{arch.name}.{name}", pack_kernels(kernels, arch))
        print(f"{name}: {len(kernels)} kernels in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
