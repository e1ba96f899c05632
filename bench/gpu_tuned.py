"""What tuning gives: a model's kernels measured as `millrace tune` measures, then served with the table and without.

python -m bench.gpu_kernels .gpu --models llama-3.2-1b --quants bf16 --candidates      (needs no GPU)
python -m bench.gpu_tuned .gpu --model llama-3.2-1b --quant bf16 --cases b1,t1,t3
Prints a JSON line for each site; for each choice that changed, whole steps without and with it alone, in turns (what
`kernels/shipped_tuning.py` is made from); then for each case and round, built-in and tuned in turns in one process.
Before that, greedy tokens of both are held against fp32 logits: they need not be equal, as another split sums in
another order, but each has to be the best token, or as near as the other's. `--tables built-in,shipped` measures the
table that comes with the code, and tunes nothing.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from bench.gpu_kernels import read
from bench.gpu_models import MODELS, as_read, quantized_graph, random_weights
from bench.gpu_offline import sanity, throughput
from kernels.launcher import KernelLibrary
from kernels.lowering import sites
from kernels.regimes import REGIMES, Regime
from kernels.tuning import BUILT_IN, Site, TuningTable
from runtime_service.execution.cuda_engine import CudaEngine, assemble
from runtime_service.execution.cuda_executor import PackedWeights
from runtime_service.execution.device_stream import CudaStream
from runtime_service.execution.options import RunnerOptions
from runtime_service.execution.step_timer import CudaClock, StepTimer, fitting_steps
from runtime_service.execution.tuned import shipped_table, site_of
from runtime_service.execution.tuner import tune
from shared.arch import Arch
from shared.ir import Graph
from shared.tuning import TunedSite

# An engine by a table may be slower by what two readings of one engine differ.
_NOISE = 0.01
# Readings of whole steps without a row and with it.
_TURNS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="llama-3.2-1b")
    parser.add_argument("--quant", default="bf16")
    parser.add_argument("--cases", default="b1,t1,t3")
    parser.add_argument("--tables", default="built-in,tuned", help="of built-in, shipped and tuned")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--kv-gib", type=float, default=12, help="of each of the engines")
    options = parser.parse_args()
    sizes = MODELS[options.model]
    graph = quantized_graph(sizes, options.quant)
    library = read(options.folder, f"{options.arch}.models")
    packed = random_weights(graph)
    weights = as_read(graph, packed)
    gpu = torch.cuda.get_device_name()
    common = {"gpu": gpu, "model": options.model, "quant": options.quant}
    tables: dict[str, TuningTable] = {}
    for name in options.tables.split(","):
        if name == "tuned":
            tables[name] = measured_table(graph, library, weights, common)
        else:
            tables[name] = {} if name == "built-in" else shipped_table(graph, library, gpu)
    engines = {}
    for name, table in tables.items():
        engine = assembled(graph, library, weights, table, int(options.kv_gib * (1 << 30)))
        engine.runner.warm_up()
        checked = sanity(engine, graph, packed, sizes)
        print(json.dumps(common | {"engine": name, "rows": len(table)} | checked), flush=True)
        engines[name] = engine
    slower = []
    for case in options.cases.split(","):
        speeds: dict[str, list[float]] = {name: [] for name in engines}
        for number in range(options.rounds):
            for name, engine in engines.items():
                result = throughput(engine, sizes.vocab, case)
                speeds[name].append(float(str(result["out_tok_s"])))
                line = {"case": case, "round": number, "engine": name}
                print(json.dumps(common | line | result), flush=True)
        first, *others = speeds
        before = statistics.median(speeds[first])
        for name in others:
            ratio = statistics.median(speeds[name]) / before
            print(json.dumps(common | {"case": case, name: round(ratio, 4), "of": first}))
            if ratio < 1 - _NOISE:
                slower.append(case)
    raise SystemExit(f"slower: {', '.join(slower)}" if slower else 0)


def measured_table(
    graph: Graph, library: KernelLibrary, weights: PackedWeights, common: dict[str, str]
) -> TuningTable:
    """What tuning chooses, each site told as it is known; then what each choice gives alone."""
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
        took_s = round(time.perf_counter() - began, 1)
        line = {"sites": len(rows), "changed": len(table), "tune_s": took_s}
        print(json.dumps(common | line), flush=True)
        for each in whole_steps(graph, library.arch, timer, table):
            print(json.dumps(each), flush=True)
    del timer
    torch.cuda.empty_cache()
    return table


def whole_steps(
    graph: Graph, arch: Arch, timer: StepTimer, table: TuningTable
) -> Iterator[dict[str, object]]:
    """Each row of a table alone, in a whole step of the largest regime that has its site; microseconds."""
    for site, choice in table.items():
        regime = _regime_of(graph, arch, site)
        readings: tuple[list[float], list[float]] = [], []
        for _ in range(_TURNS):
            for of, into in zip((BUILT_IN, {site: choice}), readings, strict=True):
                into.append(round(timer.time(regime, of, None).median_us, 2))
        before, after = map(statistics.median, readings)
        yield {
            "site": str(site), "choice": choice, "step_us": readings[0], "with_it_us": readings[1],
            "gain": round(1 - after / before, 4),
        }  # fmt: skip


def _regime_of(graph: Graph, arch: Arch, site: Site) -> Regime:
    """Decode where it can be."""
    having = [regime for regime in REGIMES if site in sites(graph, arch, regime)]
    return [regime for regime in having if regime.max_sequences or having[0].max_sequences == 0][-1]


def assembled(
    graph: Graph,
    library: KernelLibrary,
    weights: PackedWeights,
    table: TuningTable,
    kv_bytes: int,
) -> CudaEngine:
    """The GPU path by a table, all graphs captured."""
    with torch.inference_mode():
        made = assemble(
            graph, library, weights, RunnerOptions(kv_bytes=kv_bytes), CudaStream(),
            lambda: torch.cuda.mem_get_info()[0], table,
        )  # fmt: skip
        made.graphs.capture()
    return made


if __name__ == "__main__":
    main()
