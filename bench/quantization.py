"""What each scheme costs and gains on one model: quality, size and CPU decode speed, in one table.

    python -m bench.quantization STORE [--model sample:smollm2-135m] [--schemes bf16,int8,...]

Builds an engine per scheme with no limit that could fail it, reads quality from the engine's own
report, and then decodes with all of them in turns, so that a noisy machine is noisy for all. Prints
a JSON line a scheme, then the table of docs/QUANTIZATION.md.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.cpu_decode import generate
from compiler_service.builder import BuildRequest, build
from compiler_service.resolve import resolve
from runtime_service.execution.loading import LoadedEngine, load_runner
from runtime_service.execution.options import RunnerOptions
from runtime_service.scheduling.request import SamplingParams
from shared.engine import EngineManifest, QuantConfig
from shared.store.local import LocalStore

SCHEMES = "bf16,int8,w8a8-int8,int4-rtn,int4-awq,int4-gptq"
UNMEASURED = ("bf16", "fp32")
NO_LIMIT = 1000.0
PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 64, 64, 3


def main() -> None:
    """Builds, measures, prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("--model", default="sample:smollm2-135m")
    parser.add_argument("--schemes", default=SCHEMES)
    parser.add_argument("--group-size", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--probe-tokens", type=int, default=0)
    arguments = parser.parse_args()
    store = LocalStore(arguments.store)
    rows = {}
    for scheme in arguments.schemes.split(","):
        group_size = arguments.group_size if scheme.startswith("int4") else 0
        started_s = time.monotonic()
        probe_tokens = 0 if scheme in UNMEASURED else arguments.probe_tokens
        quant = QuantConfig(scheme, group_size, probe_tokens=probe_tokens)
        engine = _engine(store, arguments.model, quant)
        seconds = time.monotonic() - started_s
        rows[scheme] = {**_quality(store, engine), "build_s": round(seconds, 1)}
        rows[scheme]["megabytes"] = round(sum(blob.size_bytes for blob in engine.layers) / 1e6, 1)
        rows[scheme]["engine"] = engine
    options = RunnerOptions(max_sequence_tokens=512, num_threads=arguments.threads or None)
    loaded = {s: load_runner(store, row.pop("engine"), options) for s, row in rows.items()}
    speeds: dict[str, list[float]] = {scheme: [] for scheme in rows}
    for _ in range(ROUNDS):
        for scheme, engine_loaded in loaded.items():
            speeds[scheme].append(_decode_speed(engine_loaded))
    for scheme, row in rows.items():
        row["decode_tok_s"] = round(max(speeds[scheme]), 1)
        print(json.dumps({"scheme": scheme, **row}))
    print(_table(rows))


def _engine(store: LocalStore, model_uri: str, quant: QuantConfig) -> EngineManifest:
    limit = 0.0 if quant.scheme in UNMEASURED else NO_LIMIT
    quant = replace(quant, max_kl=limit, max_perplexity_increase=limit)
    cache = store.root / "cache"
    resolved = resolve(model_uri, ["cpu"], quant, "", cache)
    request = BuildRequest(model_uri, resolved.keys["cpu"], resolved.model, cache)
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


def _decode_speed(loaded: LoadedEngine) -> float:
    """Tokens a second of one stream, from the median step."""
    sampling = SamplingParams(temperature=0.0, seed=1)
    _, steps = generate(loaded, 1, PROMPT_TOKENS, NEW_TOKENS, sampling)
    return 1 / statistics.median(steps)


def _table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| scheme | KL mean | KL p99 | same top token | perplexity | needles | size, MB | decode tok/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for scheme, row in rows.items():
        if "kl_mean" in row:
            quality = (
                f"{row['kl_mean']:.4f} | {row['kl_p99']:.3f} | {row['top1']:.1%} | "
                f"{row['perplexity']:.2f} ({row['perplexity_increase']:+.1%}) | {row['needles']}"
            )
        else:
            quality = " | | | | "
        lines.append(f"| `{scheme}` | {quality} | {row['megabytes']} | {row['decode_tok_s']:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
