"""An engine without a model that takes a GPU's time for a step: what the front process is measured with on any machine.

Its loader is given to the real engine process: `bench.paced_engine:load`. Tokens are random, over the whole vocabulary.
"""

import os
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.emissions import NotingRunner
from runtime_service.limits import RuntimeLimits
from runtime_service.scheduling.output import ModelRunnerOutput, SampledSequence, SchedulerOutput

LOADER = "bench.paced_engine:load"
EMISSIONS = "emissions"
# Milliseconds of a step; in the environment, as a daemon passes its loader nothing of its own.
STEP_MS = "BENCH_STEP_MS"


@dataclass
class _Step:
    output: ModelRunnerOutput
    ends_s: float

    def result(self) -> ModelRunnerOutput:
        time.sleep(max(self.ends_s - time.monotonic(), 0))
        return self.output


class PacedRunner:
    """Steps end one after the other, `step_s` apart."""

    def __init__(self, step_s: float, vocab_size: int) -> None:
        self._step_s = step_s
        self._free_s = 0.0
        draw = random.Random(0)
        self._tokens = [(draw.randrange(vocab_size),) for _ in range(1 << 14)]
        self._at = 0

    def warm_up(self) -> None:
        """Nothing is cold."""

    def use_idle_time(self) -> bool:
        """Nothing is left to prepare."""
        return False

    def execute(self, step: SchedulerOutput) -> _Step:
        """Draws at once, and shows it in time."""
        rows = [s.row for s in step.scheduled if s.is_sampled]
        self._at = (self._at + len(rows)) % (len(self._tokens) // 2)
        tokens = self._tokens[self._at : self._at + len(rows)]
        sampled = tuple(map(SampledSequence, rows, tokens))
        self._free_s = max(self._free_s, time.monotonic()) + self._step_s
        return _Step(ModelRunnerOutput(step.step, sampled, {}), self._free_s)


@dataclass
class PacedEngine:
    """As an engine process serves it."""

    runner: NotingRunner
    limits: RuntimeLimits
    phases: tuple[tuple[str, float], ...] = ()


def load(*, store: str, engine: str, **chosen: Any) -> PacedEngine:
    """The loader."""
    limits = RuntimeLimits(
        max_sequence_tokens=4096, max_sequences=512, max_step_tokens=8192, block_tokens=16,
        num_blocks=1 << 16, kv_dtype="bfloat16", kv_bytes=1, kv_reason="there is no cache",
    )  # fmt: skip
    step_s = float(os.environ[STEP_MS]) / 1e3
    return PacedEngine(NotingRunner(PacedRunner(step_s, 128_000), Path(store) / EMISSIONS), limits)
