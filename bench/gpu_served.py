"""Throughput over gRPC on a GPU: the real daemon, front and engine process, against the same engine in one process.

    python -m bench.gpu_kernels build/gpu --models llama-3.1-8b         (needs no GPU)
    python -m bench.gpu_served build/gpu FOLDER --model llama-3.1-8b --quant bf16 --cases t1,t2

FOLDER gets a store with an engine of random weights, as large as the model. The engine process measures the workloads
of `bench.gpu_offline` without a daemon, then serves: on 8 multiplexed calls, and on one call a generation. One JSON
line a case; `ratio` is to the offline number of the same process.
"""

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.emissions import NotingRunner, read_emissions
from bench.front_path import Daemon, measured, running_daemon
from bench.served_load import Work
from bench.served_report import report

LOADER = "bench.gpu_served:load_measured"
_EMISSIONS, _OFFLINE, _CASES = "emissions", "offline.json", "cases"
_NUM_FIRST_TOKENS = 20
_CALLS = 8


def load_measured(*, store: str, engine: str, **chosen: Any) -> Any:
    """The loader: the engine, once its offline numbers are in the store's folder."""
    from dataclasses import replace

    from bench.gpu_offline import throughput
    from runtime_service.execution.loader import load_engine

    root = Path(store)
    loaded = load_engine(store, engine, **chosen)
    loaded.runner.warm_up()
    while loaded.runner.use_idle_time():
        pass  # both sides are measured with all graphs
    offline: dict[str, Any] = {"load": dict(loaded.phases)}
    for case in (root / _CASES).read_text().split(","):
        offline[case] = throughput(loaded, _VOCAB, case)  # type: ignore[arg-type]
    firsts = [first_token_offline(loaded) for _ in range(_NUM_FIRST_TOKENS)]
    offline["ttft_ms"] = round(statistics.median(firsts) * 1e3, 3)
    (root / _OFFLINE).write_text(json.dumps(offline))
    return replace(loaded, runner=NotingRunner(loaded.runner, root / _EMISSIONS))


_VOCAB = 120_000


def first_token_offline(loaded: Any) -> float:
    """Seconds from a request of 128 tokens to its first one, nothing else running."""
    from bench.offline_loop import Loop, request

    loop = Loop(loaded.runner, loaded.limits)
    asked = request(0, 128, 2, _VOCAB)
    began = time.perf_counter()
    loop.scheduler.add(asked)
    while not loop.token_ids:
        loop.step()
    first = time.perf_counter() - began
    loop.drain()
    return first


def write_engine(
    root: Path, kernels: Path, model: str, quant: str, arch: str = "sm_90"
) -> dict[str, float]:
    """Publishes an engine of random weights; several threads write, as it is as large as the model."""
    import torch

    from bench.gpu_models import MODELS, quantized_graph, random_weights
    from bench.gpu_timing import require_gpu
    from bench.served_store import publish_textual
    from kernels.variant import CODE_TITLE, INDEX_TITLE
    from shared.engine import (
        KERNELS_TYPE,
        WEIGHT_INDEX_TYPE,
        WEIGHTS_TYPE,
        Blob,
        StoredTensor,
        WeightIndex,
    )
    from shared.store import LocalStore
    from shared.store.weights import INDEX_TITLE as WEIGHTS_TITLE
    from shared.store.weights import weights_title
    from shared.weight_layout import WeightLayout, tensor_bytes

    require_gpu()
    began = time.perf_counter()
    store = LocalStore(root)
    graph = quantized_graph(MODELS[model], quant)
    packed = random_weights(graph)
    layout = WeightLayout()
    places: dict[str, dict[str, StoredTensor]] = {}
    blobs: dict[int, list[tuple[int, torch.Tensor]]] = {}
    for name, roles in packed.items():
        places[name] = {role: layout.place(tensor) for role, tensor in roles.items()}
        for role, tensor in roles.items():
            stored = places[name][role]
            blobs.setdefault(stored.blob, []).append((stored.offset, tensor))

    def write(number: int) -> Blob:
        def pieces() -> Iterator[Any]:
            end = 0
            for offset, tensor in blobs[number]:
                yield b"\0" * (offset - end)
                yield tensor_bytes(tensor)
                end = offset + tensor.nbytes

        return store.write_blob(pieces(), WEIGHTS_TYPE, weights_title(number))

    with ThreadPoolExecutor(16) as threads:
        weights = list(threads.map(write, sorted(blobs)))
    written = time.perf_counter()
    index = store.write_blob([WeightIndex(places).to_json()], WEIGHT_INDEX_TYPE, WEIGHTS_TITLE)
    machine_code = [
        store.write_blob(
            [(kernels / f"{arch}.models.{Path(title).name}").read_bytes()], KERNELS_TYPE, title
        )
        for title in (INDEX_TITLE, CODE_TITLE)
    ]
    publish_textual(
        store, model, arch, quant, MODELS[model].vocab, graph.to_json().encode(),
        (index, *weights, *machine_code),
    )  # fmt: skip
    return {
        "weights_gb": round(sum(blob.size_bytes for blob in weights) / 1e9, 2),
        "write_s": round(written - began, 2),
    }


def serve_cases(daemon: Daemon, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every case both ways, and the first token of a stream that is alone."""
    from bench.gpu_offline import CASES

    root: Path = options.folder
    offline = json.loads((root / _OFFLINE).read_text())
    number = 1000
    work = Work(number, _NUM_FIRST_TOKENS, 128, 2, 1, is_multiplexed=False, is_one_by_one=True)
    seen, _ = measured(daemon, work)
    # Without the first one, which is the connection's first as well.
    firsts = [a.tokens[0][0] - a.asked_s for n, a in sorted(seen.items()) if n > number]
    ours = statistics.median(firsts) * 1e3
    yield {
        "case": "ttft", "offline_ms": offline["ttft_ms"], "served_ms": round(ours, 3),
        "added_ms": round(ours - offline["ttft_ms"], 3),
    }  # fmt: skip
    for case in options.cases.split(","):
        count, input_tokens, output_tokens = CASES[case]
        for is_multiplexed in (True, False):
            number += 1000
            work = Work(
                number,
                count,
                input_tokens,
                output_tokens,
                min(options.processes, count),
                is_multiplexed,
            )
            seen, cpu_s = measured(daemon, work)
            result = report(work, seen, read_emissions(root / _EMISSIONS), cpu_s)
            best = offline[case]["out_tok_s"]
            yield {
                "case": case, "calls": "multiplexed" if is_multiplexed else "own",
                "offline_tok_s": best, "ratio": round(float(str(result["out_tok_s"])) / best, 4),
            } | result  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kernels", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--quant", default="bf16")
    parser.add_argument("--cases", default="t1,t2")
    parser.add_argument("--relays", type=int, default=0)
    parser.add_argument("--processes", type=int, default=_CALLS, help="of clients")
    parser.add_argument("--keeps", action="store_true", help="leave the store there")
    options = parser.parse_args()
    common = {"model": options.model, "quant": options.quant}
    shutil.rmtree(options.folder, ignore_errors=True)
    written = write_engine(options.folder, options.kernels, options.model, options.quant)
    print(json.dumps(common | {"case": "write"} | written), flush=True)
    (options.folder / _CASES).write_text(options.cases)
    flags = ("--model", options.model, "--quant", options.quant, "--kv-bytes", str(36 << 30))
    flags = (*flags, "--relays", str(options.relays))
    try:
        with running_daemon(options.folder, LOADER, *flags) as daemon:
            offline = json.loads((options.folder / _OFFLINE).read_text())
            print(json.dumps(common | {"case": "offline"} | offline), flush=True)
            for line in serve_cases(daemon, options):
                print(json.dumps(common | line), flush=True)
    finally:
        if not options.keeps:
            shutil.rmtree(options.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
