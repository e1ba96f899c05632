"""Decode and prompt speed of an engine on this CPU, straight on the model runner: no daemon, no gRPC.

    python bench/cpu_decode.py STORE ENGINE [--threads N]

Prints one JSON line a workload: ms a step and tokens/s, medians over rounds. STORE is a folder with
the engine (bench/build_sample.py makes one), ENGINE its name or a prefix of its digest.
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import torch

from runtime_service.execution.loading import LoadedEngine, load_runner
from runtime_service.execution.options import RunnerOptions
from runtime_service.scheduling.output import NewSequence, ScheduledSequence, SchedulerOutput
from runtime_service.scheduling.request import SamplingParams, StopParams
from shared.store.local import LocalStore

# name: (sequences, prompt tokens, new tokens)
WORKLOADS = {
    "1 stream 64/128": (1, 64, 128),
    "16 streams 64/128": (16, 64, 128),
    "prompt 512": (1, 512, 1),
}


def generate(
    loaded: LoadedEngine, sequences: int, prompt: int, new: int, sampling: SamplingParams
) -> tuple[float, list[float]]:
    """Seconds of the prompts, and of each decode step after them."""
    block_tokens = loaded.limits.block_tokens
    blocks = -(-(prompt + new) // block_tokens)
    generator = random.Random(0)
    entering = tuple(
        NewSequence(
            row,
            [generator.randrange(100, 40_000) for _ in range(prompt)],
            prompt,
            sampling,
            StopParams(new),
            0,
            0,
            [row + index * sequences for index in range(blocks)],
        )
        for row in range(sequences)
    )
    start = time.perf_counter()
    per_step = max(1, loaded.limits.max_step_tokens // prompt)
    for first in range(0, sequences, per_step):
        some = entering[first : first + per_step]
        scheduled = tuple(ScheduledSequence(s.row, 0, prompt) for s in some)
        loaded.runner.execute(SchedulerOutput(0, (), some, (), scheduled)).result()
    prompt_s = time.perf_counter() - start
    steps = []
    for position in range(prompt, prompt + new - 1):
        scheduled = tuple(ScheduledSequence(row, position, 1) for row in range(sequences))
        begin = time.perf_counter()
        loaded.runner.execute(SchedulerOutput(0, (), (), (), scheduled)).result()
        steps.append(time.perf_counter() - begin)
    return prompt_s, steps


def main() -> None:
    """Measures every workload."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store")
    parser.add_argument("engine")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    arguments = parser.parse_args()
    store = LocalStore(Path(arguments.store))
    options = RunnerOptions(max_sequence_tokens=2048, num_threads=arguments.threads or None)
    loaded = load_runner(store, store.get(arguments.engine), options)
    loaded.runner.warm_up()
    print(json.dumps({"phases": loaded.phases, "threads": torch.get_num_threads()}))
    sampling = SamplingParams(temperature=arguments.temperature, top_p=arguments.top_p, seed=1)
    for name, (sequences, prompt, new) in WORKLOADS.items():
        prompts, decodes = [], []
        for _ in range(arguments.rounds):
            prompt_s, steps = generate(loaded, sequences, prompt, new, sampling)
            prompts.append(sequences * prompt / prompt_s)
            decodes.append(statistics.median(steps) if steps else 0.0)
        line = {"workload": name, "prompt_tok_s": round(statistics.median(prompts))}
        if new > 1:
            step_s = statistics.median(decodes)
            line |= {"step_ms": round(step_s * 1e3, 2), "decode_tok_s": round(sequences / step_s)}
        print(json.dumps(line))


if __name__ == "__main__":
    main()
