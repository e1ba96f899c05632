"""Offline throughput of the whole engine: the real scheduler, overlap, and the GPU's model runner, in one process.

python -m bench.gpu_offline .gpu --model llama-3.1-8b --quant bf16 --cases b1,t1,t2,t3,itl,long
Random weights, random prompts (no prefix hits), greedy, end tokens ignored; `.gpu` is what `bench.gpu_kernels` made.
Choices are those of the shipped tuning table, as in a runtime, where `.gpu` holds their kernels (`--candidates`).
Prints one JSON line a case: output tokens per second from the first request to the last token, after a warm-up, the
median of `--rounds`, and how near that is to the device's measured limits (see gpu_roofline.py).
"""

import argparse
import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from bench.gpu_kernels import read
from bench.gpu_models import (
    MODELS,
    LlamaSizes,
    as_read,
    quantized_graph,
    random_weights,
    reference_logits,
    weight_bytes,
)
from bench.gpu_roofline import Roofline, measured_limits
from bench.offline_loop import Loop, request
from kernels.kv_cache import kv_format
from runtime_service.execution.cuda_engine import CudaEngine, assemble
from runtime_service.execution.device_stream import CudaStream
from runtime_service.execution.options import RunnerOptions
from runtime_service.execution.tuned import shipped_table

# Requests, prompt tokens and output tokens of each.
CASES = {
    "b1": (1, 128, 256), "t1": (256, 512, 256), "t2": (512, 128, 128), "t3": (64, 2048, 128),
    # TensorRT-LLM 1.0's published fp8 table, at reduced request counts.
    "128/128": (1024, 128, 128), "1000/1000": (256, 1000, 1000), "2048/128": (256, 2048, 128),
}  # fmt: skip
_ITL_STREAMS, _ITL_PROMPT_TOKENS, _ITL_PERIOD_S = 32, 2000, 1.0
_SHORT_STREAMS, _SHORT_TOKENS, _LONG_TOKENS = 63, 512, 65_536


def throughput(
    engine: CudaEngine, vocab_size: int, case: str, roofline: Roofline | None = None
) -> dict[str, object]:
    """One case of CASES; with a fresh `roofline`, also how near it came to what the device can do."""
    count, prompt_tokens, output_tokens = CASES[case]
    warm = min(count, max(1, 2 * engine.limits.max_step_tokens // prompt_tokens))
    loop = Loop(engine.runner, engine.limits)
    for number in range(warm):
        loop.scheduler.add(request(number, prompt_tokens, 8, vocab_size))
    loop.drain()
    requests = [request(n, prompt_tokens, output_tokens, vocab_size) for n in range(count)]
    loop = Loop(engine.runner, engine.limits, roofline)
    began = time.perf_counter()
    for each in requests:
        loop.scheduler.add(each)
    loop.drain()
    wall = time.perf_counter() - began
    t, total = loop.timings, sum(map(len, loop.token_ids.values()))
    assert total == count * output_tokens, f"{total} tokens came, not {count * output_tokens}"
    first = min(times[0] for times in t.gained_s.values())
    result: dict[str, object] = {
        "out_tok_s": round(total / wall, 1), "wall_s": round(wall, 3), "steps": t.steps,
        "step_ms": round(wall / t.steps * 1e3, 4), "first_token_s": round(first - began, 4),
        "host_ms_a_step": {
            name: round(spent / t.steps * 1e3, 4)
            for name, spent in (
                ("schedule", t.schedule_s), ("execute", t.execute_s), ("wait", t.wait_s),
                ("update", t.update_s),
            )
        },
    }  # fmt: skip
    if roofline is not None:
        result["roofline"] = roofline.line(wall)
    if count == 1:
        (times,) = t.gained_s.values()
        decode = (times[-1] - times[0]) / (len(times) - 1)
        result |= {
            "ms_per_token": round(wall / total * 1e3, 4),
            "decode_ms": round(decode * 1e3, 4),
        }
    return result


def median_round(run: Callable[[], dict[str, object]], rounds: int) -> dict[str, object]:
    """The case whose throughput is the median of `rounds` of it; of an even number the better one in the middle."""
    results = sorted((run() for _ in range(rounds)), key=lambda r: float(str(r["out_tok_s"])))
    return {**results[rounds // 2], "rounds": rounds}


def latency(engine: CudaEngine, vocab_size: int, seconds: float) -> dict[str, object]:
    """Gaps between tokens of 32 streams, alone and while a 2,000-token prompt arrives each second."""
    result: dict[str, object] = {}
    for name, with_prompts in (("alone", False), ("with_prompts", True)):
        loop = Loop(engine.runner, engine.limits)
        room = engine.limits.max_sequence_tokens - 256
        for number in range(_ITL_STREAMS):
            loop.scheduler.add(request(number, 128, room, vocab_size))
        while loop.timings.steps < 20:
            loop.step()
        prompts = [
            request(1000 + n, _ITL_PROMPT_TOKENS, 1, vocab_size)
            for n in range(int(seconds / _ITL_PERIOD_S) if with_prompts else 0)
        ]
        began, arrived = time.perf_counter(), 0
        while (now := time.perf_counter() - began) < seconds:
            if arrived < len(prompts) and now >= (arrived + 0.5) * _ITL_PERIOD_S:
                loop.scheduler.add(prompts[arrived])
                arrived += 1
            loop.step()
        for number in range(_ITL_STREAMS):
            loop.scheduler.abort(number)
        loop.drain()
        gaps = sorted(
            later - sooner
            for number in range(_ITL_STREAMS)
            for times in (loop.timings.gained_s[number],)
            for sooner, later in itertools.pairwise(times)
            if sooner >= began
        )
        result[name] = {
            "median_ms": round(statistics.median(gaps) * 1e3, 3),
            "p99_ms": round(gaps[int(len(gaps) * 0.99)] * 1e3, 3),
            "max_ms": round(gaps[-1] * 1e3, 3),
            "prompts": arrived,
        }
    return result


def beside_long(engine: CudaEngine, vocab_size: int) -> dict[str, object]:
    """Gaps between tokens of 63 short streams, beside another short one and beside one with a long context: of steps
    that decode alone, and of those with a chunk of a new prompt."""
    result: dict[str, object] = {}
    for name, tokens in (("short", _SHORT_TOKENS), ("long", _LONG_TOKENS)):
        loop = Loop(engine.runner, engine.limits)
        streams = {n: request(n, _SHORT_TOKENS, 2000, vocab_size) for n in range(_SHORT_STREAMS)}
        streams[-1] = request(-1, tokens, 2000, vocab_size)
        for stream in streams.values():
            loop.scheduler.add(stream)
        while len(loop.timings.gained_s) < len(streams):
            loop.step()
        decode_began = time.perf_counter()
        for _ in range(100):
            loop.step()
        prompts_began = time.perf_counter()
        for number in range(20):
            loop.scheduler.add(request(1000 + number, _SHORT_TOKENS, 1, vocab_size))
            while 1000 + number not in loop.timings.gained_s:
                loop.step()
        ended = time.perf_counter()
        for stream in streams:
            loop.scheduler.abort(stream)
        loop.drain()
        for kind, start, end in (
            ("decode_ms", decode_began, prompts_began),
            ("with_chunk_ms", prompts_began, ended),
        ):
            gaps = [
                later - sooner
                for sooner, later in itertools.pairwise(loop.timings.gained_s[0])
                if start <= sooner and later <= end
            ]
            result[f"{name}_{kind}"] = round(statistics.median(gaps) * 1e3, 3)
    return result


def sanity(
    engine: CudaEngine, graph: object, packed: dict[str, dict[str, torch.Tensor]], sizes: LlamaSizes
) -> dict[str, object]:
    """Greedy tokens against fp32 logits of the same history: how far below the best each one lies, in deviations."""
    loop = Loop(engine.runner, engine.limits)
    asked = request(0, 40, 24, sizes.vocab)
    prompt = list(asked.prompt_token_ids)
    loop.scheduler.add(asked)
    loop.drain()
    tokens = prompt + loop.token_ids[0]
    gaps = []
    for end in (40, 41, 52, 63):
        history = torch.tensor(tokens[:end], device="cuda")
        logits = reference_logits(graph, packed, history, sizes)  # type: ignore[arg-type]
        gaps.append(float((logits.max() - logits[tokens[end]]) / logits.std()))
    return {"top1_agrees": sum(g == 0 for g in gaps) / len(gaps), "worst_gap": round(max(gaps), 4)}


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--quant", default="bf16")
    parser.add_argument("--cases", default="b1,t1,t2,t3")
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--kv-cache", default="", choices=("", "fp8", "int8"))
    parser.add_argument("--kv-gib", type=float, default=36)
    parser.add_argument(
        "--step-tokens", type=int, help="the most of a step; else as a daemon chooses"
    )
    parser.add_argument("--requests", type=int, help="in place of each case's number")
    parser.add_argument("--rounds", type=int, default=1, help="of each case; the median is told")
    parser.add_argument("--itl-seconds", type=float, default=6)
    parser.add_argument("--eager", action="store_true", help="capture no graphs")
    parser.add_argument("--deadline-s", type=float, default=1e9, help="no case starts after it")
    options = parser.parse_args()
    sizes = MODELS[options.model]
    graph = quantized_graph(sizes, options.quant, kv_cache=options.kv_cache)
    library = read(options.folder, f"{options.arch}.models")
    device_limits = measured_limits(options.quant)
    torch.cuda.empty_cache()
    packed = random_weights(graph)
    torch.cuda.synchronize()
    made = time.perf_counter()
    limits = RunnerOptions(
        max_step_tokens=options.step_tokens,
        kv_bytes=int(options.kv_gib * (1 << 30)),
        max_sequence_tokens=131_072 if "long" in options.cases.split(",") else 8192,
    )
    if options.requests:
        CASES.update({name: (options.requests, *case[1:]) for name, case in CASES.items()})
    with torch.inference_mode():
        engine = assemble(
            graph,
            library,
            as_read(graph, packed),
            limits,
            CudaStream(),
            lambda: torch.cuda.mem_get_info()[0],
            shipped_table(graph, library, torch.cuda.get_device_name()),
        )
        assembled = time.perf_counter()
        if not options.eager:
            engine.graphs.capture()
        torch.cuda.synchronize()
    captured = time.perf_counter()
    engine.runner.warm_up()
    gc.collect()
    gc.freeze()  # as the engine process does
    common = {
        "model": options.model,
        "quant": options.quant,
        "kv_cache": options.kv_cache,
        "gpu": torch.cuda.get_device_name(),
    }
    start = {
        "case": "start", "weights_s": made - began, "allocate_s": assembled - made,
        "capture_s": captured - assembled, "graphs": engine.graphs.num_graphs,
        "warm_up_s": time.perf_counter() - captured,
    }  # fmt: skip
    print(json.dumps(common | start), flush=True)

    def case_of(name: str) -> dict[str, object]:
        kv_bytes = kv_format(graph).bytes_per_token(graph)
        roofline = Roofline(sizes, device_limits, weight_bytes(graph, packed), kv_bytes)
        return throughput(engine, sizes.vocab, name, roofline)

    cases: dict[str, Callable[[], dict[str, object]]] = {
        name: partial(median_round, partial(case_of, name), options.rounds) for name in CASES
    }
    cases["itl"] = lambda: latency(engine, sizes.vocab, options.itl_seconds)
    cases["long"] = lambda: beside_long(engine, sizes.vocab)
    cases["sanity"] = lambda: sanity(engine, graph, packed, sizes)
    for name in ("sanity", *options.cases.split(",")):
        if time.perf_counter() - began > options.deadline_s:
            print(json.dumps(common | {"case": name, "skipped": "deadline"}), flush=True)
            continue
        try:
            result = cases[name]()
        except Exception as error:  # a line for the failing case, and on to the next
            result = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(common | {"case": name} | result), flush=True)


if __name__ == "__main__":
    main()
