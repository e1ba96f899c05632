"""The engine's loop alone, without processes or gRPC: what the wire's cost is measured against.

    python bench/engine_loop.py STORE QUANT STREAMS PROMPT_TOKENS NEW_TOKENS

Same figures as bench/peers/millrace_run.py, one JSON line.
"""

import argparse
import json
import random
import time
from pathlib import Path

from runtime_service.engine_core import EngineCore
from runtime_service.engine_messages import AddRequest, Command, Shutdown, StepOutputs
from runtime_service.execution.loader import load_engine
from runtime_service.scheduling.request import Request, SamplingParams, StopParams
from runtime_service.scheduling.scheduler import Scheduler
from shared.engine import EngineSelector, QuantConfig
from shared.store.local import LocalStore


class Bench:
    """A mailbox that hands out rounds of requests and notes when their tokens come.

    Args:
        rounds: (streams, prompt tokens, new tokens), one after the other.
    """

    def __init__(self, rounds: list[tuple[int, int, int]]) -> None:
        self._rounds = list(reversed(rounds))
        self._random = random.Random(time.time_ns())
        self._num_requests = self._open = 0
        self._waiting: set[int] = set()
        self.begin_s = self.first_s = self.end_s = 0.0

    def receive(self, wait: bool) -> list[Command]:
        """The next round where the one before has ended."""
        if self._open:
            return []
        if not self._rounds:
            return [Shutdown()]
        streams, prompt_tokens, new_tokens = self._rounds.pop()
        requests = []
        for _ in range(streams):
            self._num_requests += 1
            prompt = [self._random.randrange(100, 40_000) for _ in range(prompt_tokens)]
            requests.append(
                Request(self._num_requests, prompt, SamplingParams(), StopParams(new_tokens))
            )
        self._open = streams
        self._waiting = {request.request_id for request in requests}
        self.begin_s = time.perf_counter()
        return [AddRequest(request) for request in requests]

    def send(self, reply: StepOutputs) -> None:
        """Notes what a step gave."""
        for output in reply.outputs:
            if output.request_id in self._waiting:
                self._waiting.discard(output.request_id)
                self.first_s = time.perf_counter()
            self._open -= bool(output.finish)
        self.end_s = time.perf_counter()


def main() -> None:
    """Runs a warm-up round and the round that counts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("quant")
    parser.add_argument("streams", type=int)
    parser.add_argument("prompt_tokens", type=int)
    parser.add_argument("new_tokens", type=int)
    options = parser.parse_args()
    streams, prompt_tokens, new_tokens = options.streams, options.prompt_tokens, options.new_tokens
    selector = EngineSelector("smollm2-135m", "cpu", QuantConfig(options.quant))
    engine = LocalStore(options.store).find(selector)
    if engine is None:
        raise SystemExit(f"{options.store} has no such engine: bench/build_sample.py builds it")
    loaded = load_engine(str(options.store), engine.name, max_sequence_tokens=2048)
    loaded.runner.warm_up()
    bench = Bench([(streams, 8, 4), (streams, prompt_tokens, new_tokens)])
    EngineCore(Scheduler(loaded.limits), loaded.runner, bench).run()
    decode_s, whole_s = bench.end_s - bench.first_s, bench.end_s - bench.begin_s
    print(
        json.dumps(
            {
                "decode_tok_s": (new_tokens - 1) / decode_s if new_tokens > 1 else None,
                "prompt_tok_s": streams * prompt_tokens / (bench.first_s - bench.begin_s),
                "total_tok_s": streams * new_tokens / whole_s,
            }
        )
    )


if __name__ == "__main__":
    main()
