"""Times every candidate tile of every linear of a model's decode step, from cubins, as a captured chain of layers.

python -m bench.gpu_tune .gpu [--tokens 1] [--model qwen2.5-1.5b]
"""

import argparse
import json
from pathlib import Path

import torch

from bench.gpu_kernels import (
    TUNED_LAYOUTS,
    few_tokens_candidates,
    linear_shapes,
    one_token_candidates,
    read,
)  # fmt: skip
from bench.gpu_models import MODELS
from bench.gpu_timing import captured, median_ms, read_limit_tb_s
from kernels.launcher import KernelLibrary
from kernels.linear.launch import LinearShape, Tiles, few_tokens, num_programs, one_token

_LAYERS = 16


def operands(shape: LinearShape, tokens: int) -> dict[str, torch.Tensor]:
    """Random operands of one linear, by argument name, without the weight."""
    half = {"dtype": torch.bfloat16, "device": "cuda"}
    width = shape.n if shape.epilogue == "plain" else shape.n // 2
    block = max(1, shape.block_tokens)
    cache = (-(-tokens // block), max(1, shape.num_kv_heads), block, max(1, shape.head_dim))
    ints = {"dtype": torch.int32, "device": "cuda"}
    return {
        "x": torch.randn(tokens, shape.k, **half),
        "scale": torch.rand(shape.n, device="cuda"),
        "squares": torch.rand(tokens, 64, device="cuda"),
        "gain": torch.randn(shape.n, **half),
        "normed": torch.empty(tokens, shape.n, **half),
        "squares_out": torch.empty(tokens, 1 << 16, device="cuda"),
        "partial": torch.empty(16 << 20, device="cuda"),
        "counters": torch.zeros(1 << 16, **ints),
        "rows": torch.arange(tokens, **ints),
        "residual": torch.randn(tokens, shape.n, **half),
        "out": torch.empty(tokens, width, device="cuda", dtype=torch.float32),
        "positions": torch.arange(tokens, **ints),
        "slots": torch.arange(tokens, **ints),
        "rope": torch.rand(64 + tokens, max(1, shape.head_dim), device="cuda"),
        "k_cache": torch.empty(cache, **half),
        "v_cache": torch.empty(cache, **half),
    }


def weights(shape: LinearShape) -> list[torch.Tensor]:
    """Enough layers' weights that the cache holds none of them."""
    count = 1 if shape.n > 100_000 else _LAYERS
    made = [
        torch.randn(shape.n, shape.k, device="cuda", dtype=torch.bfloat16) for _ in range(count)
    ]
    return made if shape.layout == "plain" else [w.to(torch.float8_e4m3fn) for w in made]


def time_tiles(
    library: KernelLibrary, shape: LinearShape, tokens: int, block_m: int, tiles: Tiles,
    layers: list[torch.Tensor],
) -> float:  # fmt: skip
    """TB/s of the weights, over a captured chain of layers."""
    few = few_tokens(shape, library.arch, tiles, block_m) if block_m > 1 else None
    variant = few or one_token(shape, library.arch, tiles)
    kernel = library.kernel(variant)
    tensors = operands(shape, tokens)
    grid = (num_programs(shape, tiles), -(-tokens // block_m), tiles.split_k)
    names = [a.name for a in variant.arguments]

    def chain() -> None:
        for weight in layers:
            at = {name: t.data_ptr() for name, t in tensors.items()}
            at |= {"weight": weight.data_ptr(), "num_tokens": tokens}
            kernel(grid, *(at[name] for name in names))

    graph = captured(chain, warm=1)
    ms = median_ms(graph.replay, 7, 2)
    return sum(w.nbytes for w in layers) / ms / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="llama-3.1-8b", help="one of TUNED_MODELS")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokens", default="1,16")
    parser.add_argument("--arch", default="sm_90")
    options = parser.parse_args()
    library = read(options.folder, f"{options.arch}.tune")
    print(f"read limit {read_limit_tb_s():.2f} TB/s", flush=True)
    rows = []
    for layout in TUNED_LAYOUTS:
        for name, shape in linear_shapes(MODELS[options.model], layout).items():
            layers = weights(shape)
            for tokens in map(int, options.tokens.split(",")):
                block_m = 1 if tokens == 1 else 16
                one = one_token_candidates(shape, library.arch)
                candidates = one if tokens == 1 else few_tokens_candidates(shape)
                seen = []
                for tiles in candidates:
                    rate = time_tiles(library, shape, tokens, block_m, tiles, layers)
                    seen.append((rate, tiles))
                    rows.append({"layout": layout, "shape": name, "tokens": tokens, "tb_s": round(rate, 3),
                                 "tiles": repr(tiles)})  # fmt: skip
                seen.sort(key=lambda item: -item[0])
                best = " | ".join(
                    f"{rate:.2f} n{t.block_n} k{t.block_k} w{t.num_warps} p{t.prefetch} s{t.stages} "
                    f"x{t.split_k} v{t.vector}"
                    for rate, t in seen[:5]
                )
                print(f"{layout} {name} M={tokens}: {best} | worst {seen[-1][0]:.2f}", flush=True)
            del layers
    if options.out:
        options.out.write_text("\n".join(json.dumps(row) for row in rows))


if __name__ == "__main__":
    main()
