"""An engine from a store, loaded as the runtime daemon loads it, generating greedily from one prompt.

python -m bench.gpu_engine STORE ENGINE [--prompt "Once upon a time"]
"""

import argparse
import time
from pathlib import Path

from tokenizers import Tokenizer

from bench.gpu_timing import require_gpu
from runtime_service.execution.loading import load_runner
from runtime_service.execution.options import RunnerOptions
from runtime_service.scheduling.output import NewSequence, ScheduledSequence, SchedulerOutput
from runtime_service.scheduling.request import SamplingParams, StopParams
from shared.store.local import LocalStore


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("engine")
    parser.add_argument("--prompt", default="")
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    require_gpu()
    store = LocalStore(options.store)
    engine = store.get(options.engine)
    start = time.perf_counter()
    loaded = load_runner(store, engine, RunnerOptions(max_sequences=16))
    print(f"loaded in {time.perf_counter() - start:.2f} s: {loaded.phases}")
    tokenizer = Tokenizer.from_str(store.read_all(engine.layer("tokenizer.json").digest).decode())
    ids = tokenizer.encode(options.prompt).ids or [1]
    blocks = list(range(-(-(len(ids) + options.tokens) // loaded.limits.block_tokens)))
    new = NewSequence(0, ids, len(ids), SamplingParams(), StopParams(options.tokens), 0, 0, blocks)
    out = list(ids)
    start = time.perf_counter()
    for i in range(options.tokens):
        first = (
            ScheduledSequence(0, 0, len(ids)) if i == 0 else ScheduledSequence(0, len(out) - 1, 1)
        )
        step = SchedulerOutput(i, (), (new,) if i == 0 else (), (), (first,))
        out += loaded.runner.execute(step).result().sampled[0].token_ids
    spent = time.perf_counter() - start
    print(f"{options.tokens / spent:.0f} tok/s on {engine.key.arch}: {tokenizer.decode(out)!r}")
    loaded.runner.close()


if __name__ == "__main__":
    main()
