"""What int4 costs many tokens, linear by linear, beside torch's product of the same values in bf16.

python -m bench.gpu_int4 .gpu --tokens 128,256,512,1024,2048
`.gpu` is what `bench.gpu_kernels` made of llama-3.1-8b in int4. Weights take turns, so that no cache holds them.
Prints a JSON line for each linear and number of tokens: microseconds of torch's product and of the tiles that steps
use, and the tiles' relative error to torch's product.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch

from bench.gpu_kernels import read
from bench.gpu_models import MODELS, as_read, dense, quantized_graph, random_weights
from bench.gpu_timing import captured, median_ms
from kernels.launch import Sizes
from kernels.launcher import KernelLibrary
from kernels.linear.launch import LinearShape, Tiles, tiled_scratch
from kernels.linear.launch_int4 import (
    many_int4,
    many_int4_grid,
    many_int4_tiles,
)

_LAYERS = 6

Weight = dict[str, torch.Tensor]
Run = Callable[[Weight], object]


def by_tiles(
    library: KernelLibrary, shape: LinearShape, tiles: Tiles, block_m: int, x: torch.Tensor,
    out: torch.Tensor,
) -> Run:  # fmt: skip
    """out = x @ weight.T straight from 4 bits."""
    kernel, tokens = library.kernel(many_int4(shape, library.arch, tiles, block_m)), len(x)
    sizes = Sizes(tokens, tokens, tokens)
    scratch = [
        torch.zeros(request.num_bytes(sizes), dtype=torch.uint8, device="cuda")
        for request in tiled_scratch(shape, tiles, block_m)
    ]
    grid = many_int4_grid(shape, tiles, block_m, "tokens")(sizes)

    def run(weight: Weight) -> None:
        tensors = (x, weight["weight"], weight["scale"], out, *scratch)
        kernel(grid, *(tensor.data_ptr() for tensor in tensors), tokens)

    return run


def microseconds(run: Run, weights: list[Weight]) -> float:
    """Of one run, in a captured chain over all weights."""
    graph = captured(lambda: [run(weight) for weight in weights], 1)
    return round(median_ms(graph.replay, 9, 2) / len(weights) * 1e3, 1)


def compared(
    library: KernelLibrary, shape: LinearShape, weights: list[Weight], tokens: int
) -> dict[str, object]:
    """One linear's times for so many tokens. `weights` hold their bf16 values, too."""
    half = {"device": "cuda", "dtype": torch.bfloat16}
    x = torch.randn(tokens, shape.k, **half)
    out = torch.empty(tokens, shape.n, **half)
    product = microseconds(lambda w: torch.mm(x, w["values"].t(), out=out), weights)
    row: dict[str, object] = {"bf16_us": product}
    tiles, block_m = many_int4_tiles(shape, tokens)
    run = by_tiles(library, shape, tiles, block_m, x, out)
    row["tiles_us"] = microseconds(run, weights)
    run(weights[0])
    want = torch.mm(x, weights[0]["values"].t()).float()
    row["error"] = round(float((out.float() - want).norm() / want.norm()), 5)
    row["tiles"] = f"n{tiles.block_n} m{block_m} x{tiles.split_k}"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", default="128,256,512,1024,2048")
    parser.add_argument("--arch", default="sm_90")
    options = parser.parse_args()
    library = read(options.folder, f"{options.arch}.models")
    graph = quantized_graph(MODELS["llama-3.1-8b"], "int4", _LAYERS)
    packed = random_weights(graph)
    ready = as_read(graph, packed)
    for name in ("qkv", "o", "gate_up", "down"):
        names = [f"{layer}.{name}" for layer in range(_LAYERS)]
        weights = [{**ready[n], "values": dense(packed[n]).bfloat16()} for n in names]
        n, k = graph.weights[names[0]].shape
        group = graph.weights[names[0]].group_size
        shape = LinearShape(n, k, "bf16", "bf16", "int4_group", group)
        for tokens in map(int, options.tokens.split(",")):
            row = compared(library, shape, weights, tokens)
            print(json.dumps({"linear": name, "tokens": tokens} | row), flush=True)


if __name__ == "__main__":
    main()
