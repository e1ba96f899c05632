"""What tuning gives: a model's kernels measured as `millrace tune` measures, then served with the table and without.

python -m bench.gpu_kernels .gpu --models llama-3.2-1b --quants bf16 --candidates      (needs no GPU)
python -m bench.gpu_tuned .gpu --model llama-3.2-1b --quant bf16 --cases b1,t1,t3
Prints a JSON line for each site, then for each case and round, built-in and tuned in turns in one process. Before that,
greedy tokens of both are held against fp32 logits: they need not be equal, as another split sums in another order, but
each has to be the best token, or as near as the other's.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from bench.gpu_kernels import read
from bench.gpu_models import MODELS, as_read, quantized_graph, random_weights
from bench.gpu_offline import sanity, throughput
from kernels.tuning import BUILT_IN, Site, TuningTable
from runtime_service.execution.cuda_engine import CudaEngine, assemble
from runtime_service.execution.device_stream import CudaStream
from runtime_service.execution.options import RunnerOptions
from runtime_service.execution.step_timer import CudaClock, StepTimer, fitting_steps
from runtime_service.execution.tuned import site_of
from runtime_service.execution.tuner import tune
from shared.ir import Graph
from shared.tuning import TunedSite

# A tuned engine may be slower by what two readings of one engine differ.
_NOISE = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="llama-3.2-1b")
    parser.add_argument("--quant", default="bf16")
    parser.add_argument("--cases", default="b1,t1,t3")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--kv-gib", type=float, default=12, help="of each of the two engines")
    options = parser.parse_args()
    sizes = MODELS[options.model]
    graph = quantized_graph(sizes, options.quant)
    library = read(options.folder, f"{options.arch}.models")
    packed = random_weights(graph)
    weights = as_read(graph, packed)
    began = time.perf_counter()
    table: dict[Site, str] = {}

    def tell(row: TunedSite) -> None:
        if row.choice != row.built_in:
            table[site_of(row)] = row.choice
        print(json.dumps({"site": str(site_of(row)), "built_in": row.built_in, "us": row.built_in_us,
                          "choice": row.choice, "choice_us": row.choice_us}), flush=True)  # fmt: skip

    with torch.inference_mode():
        steps = fitting_steps(graph, torch.cuda.mem_get_info()[0])
        timer = StepTimer(graph, library, weights, CudaStream(), CudaClock(), steps)
        rows = tune(graph, library.arch, timer, tell)
        del timer
        torch.cuda.empty_cache()
    common = {"gpu": torch.cuda.get_device_name(), "model": options.model, "quant": options.quant}
    print(json.dumps(common | {"sites": len(rows), "changed": len(table), "tune_s":
                               round(time.perf_counter() - began, 1)}), flush=True)  # fmt: skip

    def engine(of: TuningTable) -> CudaEngine:
        made = assembled(graph, library, weights, of, int(options.kv_gib * (1 << 30)))
        made.runner.warm_up()
        return made

    engines = {"built-in": engine(BUILT_IN), "tuned": engine(table)}
    for name, each in engines.items():
        print(json.dumps(common | {"engine": name} | sanity(each, graph, packed, sizes)))
    slower = []
    for case in options.cases.split(","):
        speeds: dict[str, list[float]] = {name: [] for name in engines}
        for number in range(options.rounds):
            for name, each in engines.items():
                result = throughput(each, sizes.vocab, case)
                speeds[name].append(float(str(result["out_tok_s"])))
                print(json.dumps(common | {"case": case, "round": number, "engine": name} | result))
        before, after = (statistics.median(speeds[name]) for name in ("built-in", "tuned"))
        print(json.dumps(common | {"case": case, "tuned_over_built_in": round(after / before, 4)}))
        if after < (1 - _NOISE) * before:
            slower.append(case)
    raise SystemExit(f"tuned is slower: {', '.join(slower)}" if slower else 0)


def assembled(
    graph: Graph,
    library: object,
    weights: dict[str, dict[str, torch.Tensor]],
    table: TuningTable,
    kv_bytes: int,
) -> CudaEngine:
    """The GPU path by a table, all graphs captured."""
    with torch.inference_mode():
        made = assemble(
            graph, library, weights, RunnerOptions(kv_bytes=kv_bytes), CudaStream(),  # type: ignore[arg-type]
            lambda: torch.cuda.mem_get_info()[0], table,
        )  # fmt: skip
        made.graphs.capture()
    return made


if __name__ == "__main__":
    main()
