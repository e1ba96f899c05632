"""Where a decode step's time goes: the step captured whole, without each kind of launch, and each kind alone.

python -m bench.gpu_profile .gpu --model llama-3.1-8b --quant bf16
"Alone" overlaps its own neighbours as the step does; "saved" is what the step gains without that kind.
"""

import argparse
from pathlib import Path

import torch

from bench.gpu_decode import DecodeLoop, regime_for
from bench.gpu_kernels import read
from bench.gpu_models import MODELS, as_read, quantized_graph, random_weights, read_bytes
from bench.gpu_timing import captured, median_ms
from kernels.launch import Launch, Sizes, Step, Weight
from runtime_service.execution.cuda_executor import CudaExecutor


def kind(step: Step) -> str:
    """What a launch is for: its weight's name without the layer, or its op."""
    if not isinstance(step, Launch):
        return step.weight.split(".")[-1]
    weights = [o.name for o in step.operands if isinstance(o, Weight)]
    return weights[0].split(".")[-1] if weights else step.variant.op


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--quant", default="bf16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--arch", default="sm_90")
    options = parser.parse_args()
    sizes = MODELS[options.model]
    graph = quantized_graph(sizes, options.quant)
    library = read(options.folder, f"{options.arch}.models")
    packed = random_weights(graph)
    batch = options.batch
    executor = CudaExecutor(graph, library, as_read(graph, packed), Sizes(batch, batch, batch))
    regime = regime_for(batch)
    loop = DecodeLoop(library, executor, sizes, graph, batch, 512, regime)
    loop.start_at(torch.zeros(batch, dtype=torch.int32, device="cuda"), 256)
    plan = executor.plan(regime)
    moved: dict[str, int] = {}
    for step in plan:
        for name in (
            {o.name for o in step.operands if isinstance(o, Weight)}
            if isinstance(step, Launch)
            else ()
        ):
            size = read_bytes(graph.weights[name], packed[name])
            moved[kind(step)] = moved.get(kind(step), 0) + size

    def milliseconds(steps: tuple[Step, ...]) -> float:
        def run() -> None:
            executor.launch(steps, regime, loop.batch)

        return median_ms(captured(run, 1).replay, 20)

    whole = milliseconds(plan)
    print(f"{options.model} {options.quant} batch {batch}: {whole:.3f} ms without the sampler")
    for name in dict.fromkeys(map(kind, plan)):
        alone = milliseconds(tuple(s for s in plan if kind(s) == name))
        without = milliseconds(tuple(s for s in plan if kind(s) != name))
        rate = moved.get(name, 0) / alone / 1e9
        print(
            f"  {name:10s} alone {alone:.3f} ms {rate:.2f} TB/s, saved without {whole - without:.3f}"
        )


if __name__ == "__main__":
    main()
