"""What each scheme costs and gains on one model: quality, size and CPU speed, in one table.

    python -m bench.quantization STORE [--model sample:smollm2-135m] [--quants bf16,int8-kv-fp8,...]
        [--calibration FILE]

Builds an engine per quant with no limit that could fail it and reads quality from the engine's own report.
Then all that run on a CPU take turns, so that a noisy machine is noisy for all; speeds are ratios to
bf16, medians over the turns; none with `--rounds 0`. Prints a JSON line a quant, then columns of the
table of docs/QUANTIZATION.md.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.cpu_decode import WORKLOADS, generate
from compiler_service.builder import BuildRequest, build
from compiler_service.quantization import scheme_named
from compiler_service.resolve import resolve
from runtime_service.execution.loading import LoadedEngine, load_runner
from runtime_service.execution.options import RunnerOptions
from runtime_service.scheduling.request import SamplingParams
from shared.arch import ARCHES
from shared.engine import EngineManifest, QuantConfig
from shared.store.local import LocalStore

BASE = "bf16"
QUANTS = (
    "bf16,fp8,fp8-static,int8,w8a8-int8,int4-rtn,int4-awq,int4-gptq,"
    "bf16-kv-fp8,bf16-kv-int8,int8-kv-fp8,int8-kv-int8,fp8-kv-fp8,int4-rtn-kv-fp8"
)
NO_LIMIT = 1000.0
# What quantizes for GPUs alone is built for this one; its report needs none.
GPU = "sm_90"


def main() -> None:
    """Builds, measures, prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("--model", default="sample:smollm2-135m")
    parser.add_argument("--quants", default=QUANTS)
    parser.add_argument("--calibration", default="", help="text to calibrate and measure with")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    store = LocalStore(arguments.store)
    rows, engines = {}, {}
    for name in arguments.quants.split(","):
        started_s = time.monotonic()
        engines[name] = _engine(store, arguments.model, name, arguments.calibration)
        seconds = time.monotonic() - started_s
        rows[name] = {**_quality(store, engines[name]), "build_s": round(seconds, 1)}
        rows[name]["megabytes"] = _weight_megabytes(engines[name])
        print(json.dumps({"quant": name, **rows[name]}), flush=True)
    if not arguments.rounds:
        print(_table(rows))
        return
    options = RunnerOptions(max_sequence_tokens=1024, num_threads=arguments.threads or None)
    loaded = {
        name: load_runner(store, engine, options)
        for name, engine in engines.items()
        if engine.key.arch == "cpu"
    }
    for name, speeds in _speeds(loaded, arguments.rounds).items():
        rows[name] |= speeds
        print(json.dumps({"quant": name, **speeds}), flush=True)
    print(_table(rows))


def _engine(store: LocalStore, model_uri: str, name: str, calibration: str) -> EngineManifest:
    scheme, _, kv_cache = name.partition("-kv-")
    quant = QuantConfig(scheme, kv_cache=kv_cache)
    row = scheme_named(quant)
    if row.measures(quant):
        quant = replace(quant, max_kl=NO_LIMIT, max_perplexity_increase=NO_LIMIT)
    arch = "cpu" if row.runs_on(ARCHES["cpu"]) else GPU
    cache = store.root / "cache"
    text = calibration if row.needs_text(quant) else ""
    resolved = resolve(model_uri, [arch], quant, "", cache, calibration_uri=text)
    request = BuildRequest(model_uri, resolved.keys[arch], resolved.model, cache, text)
    return build(request, store, lambda progress: None)


def _quality(store: LocalStore, engine: EngineManifest) -> dict[str, Any]:
    titles = {blob.title: blob for blob in engine.layers}
    if "quality.json" not in titles:
        return {}
    report = json.loads(store.read_all(titles["quality.json"].digest))
    return {
        "kl_mean": report["kl"]["mean"],
        "kl_p99": report["kl"]["p99"],
        "top1": report["top1_agreement"],
        "perplexity": report["perplexity"]["quantized"],
        "unquantized_perplexity": report["perplexity"]["unquantized"],
        "perplexity_increase": report["perplexity"]["increase"],
        "needles": f"{report['needle']['num_retrieved']} of {report['needle']['num_scored']}",
    }


def _weight_megabytes(engine: EngineManifest) -> float:
    weights = (blob for blob in engine.layers if blob.title.startswith("weights/"))
    return round(sum(blob.size_bytes for blob in weights) / 1e6, 1)


def _speeds(loaded: dict[str, LoadedEngine], rounds: int) -> dict[str, dict[str, float]]:
    """By engine and workload, the tokens a second of a turn as a ratio to bf16's in the same turn."""
    for engine in loaded.values():
        engine.runner.warm_up()
    ratios: dict[str, dict[str, float]] = {name: {} for name in loaded}
    for workload in WORKLOADS:
        turns = [
            {name: _seconds(engine, workload) for name, engine in loaded.items()}
            for _ in range(rounds)
        ]
        for name in loaded:
            found = [turn[BASE] / turn[name] for turn in turns]
            ratios[name][workload] = round(statistics.median(found), 3)
    return ratios


def _seconds(loaded: LoadedEngine, workload: str) -> float:
    """Of the median step; where none follows the prompt, of the prompt."""
    sequences, prompt, new = WORKLOADS[workload]
    sampling = SamplingParams(temperature=0.0, seed=1)
    prompt_s, steps = generate(loaded, sequences, prompt, new, sampling)
    return statistics.median(steps) if steps else prompt_s


def _table(rows: dict[str, dict[str, Any]]) -> str:
    titles = ("quant", "KL mean (p99)", "same top token", "perplexity", "needles", "MB", *WORKLOADS)
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for name, row in rows.items():
        quality = ["–"] * 4
        if "kl_mean" in row:
            quality = [
                f"{row['kl_mean']:.4f} ({row['kl_p99']:.3f})",
                f"{row['top1']:.1%}",
                f"{row['perplexity']:.2f} ({row['perplexity_increase']:+.1%})",
                str(row["needles"]),
            ]
        speeds = [f"{row[workload]:.2f}" if workload in row else "–" for workload in WORKLOADS]
        cells = (f"`{name}`", *quality, f"{row['megabytes']:.1f}", *speeds)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
