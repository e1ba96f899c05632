"""What each way of drawing costs on the CPU: 16 rows with histories of 2,000 tokens, of a vocabulary.

python -m bench.cpu_sampling --vocab 49152 --rows 16
One JSON line a case: milliseconds of a step's draws, its least beside its median, as steps of one generation follow one
another: each has a token more than the one before. Cases are taken in turn, so that a busy machine slows all of them.
Logits are normal with a deviation of 3, near to a trained model's.
"""

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np
import torch

from kernels.cpu_jit import set_num_threads
from kernels.sampling.cpu import draw_tokens
from runtime_service.sampling.sampler import Draw, RowSampler, sample
from runtime_service.scheduling.request import SamplingParams, StopParams

_HISTORY, _STEPS = 2000, 64
_PENALTIES = {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.1}

FEATURES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy, penalties": _PENALTIES,
    "temperature": {"temperature": 1.0},
    "temperature, penalties": {"temperature": 1.0, **_PENALTIES},
    "min-p": {"temperature": 1.0, "min_p": 0.05},
    "top-k 50": {"temperature": 1.0, "top_k": 50},
    "top-k 1000": {"temperature": 1.0, "top_k": 1000},
    "top-p 0.9": {"temperature": 1.0, "top_p": 0.9},
    "top-k 50, top-p 0.9": {"temperature": 1.0, "top_k": 50, "top_p": 0.9},
    "top-k 1000, top-p 0.9": {"temperature": 1.0, "top_k": 1000, "top_p": 0.9},
    "top-k 20000, top-p 0.9": {"temperature": 1.0, "top_k": 20000, "top_p": 0.9},
}


class _Case:
    """Rows that draw in one way, and how long each of their steps took."""

    def __init__(self, features: dict[str, Any], num_rows: int, vocab_size: int) -> None:
        stop = StopParams(_STEPS, 0, ())
        self._rows = [
            RowSampler(SamplingParams(seed=row, **features), stop, 0, _HISTORY // 2, vocab_size)
            for row in range(num_rows)
        ]
        random = np.random.default_rng(0)
        self._tokens = random.integers(
            vocab_size, size=(num_rows, _HISTORY + _STEPS), dtype=np.int32
        )
        self._num_tokens = _HISTORY
        self.took_ms: list[float] = []

    def step(self, logits_RV: torch.Tensor) -> None:
        """Draws a token for each row; they go on with others, which cost the same."""
        logits_RV = logits_RV.clone()
        begun = time.perf_counter()
        rows = zip(self._rows, self._tokens, strict=True)
        draws = [Draw(row, tokens[: self._num_tokens]) for row, tokens in rows]
        sample(logits_RV, draws, draw_tokens)
        self.took_ms.append(1e3 * (time.perf_counter() - begun))
        self._num_tokens += 1


def main() -> None:
    """Times every case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=49152)
    arguments = parser.parse_args()
    set_num_threads()
    torch.manual_seed(0)
    logits_RV = 3 * torch.randn(arguments.rows, arguments.vocab)
    cases = {
        name: _Case(features, arguments.rows, arguments.vocab)
        for name, features in FEATURES.items()
    }
    for _ in range(_STEPS):
        for case in cases.values():
            case.step(logits_RV)
    for name, case in cases.items():
        took_ms = case.took_ms[1:]  # the first counts the history
        told = {
            "draws": name,
            "rows": arguments.rows,
            "vocab": arguments.vocab,
            "first_ms": round(case.took_ms[0], 2),
            "median_ms": round(statistics.median(took_ms), 2),
            "least_ms": round(min(took_ms), 2),
        }
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
