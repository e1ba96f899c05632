"""When each token left the device: a runner that notes it, so that clients' clocks can be compared with the engine's.

Generations are told apart by the first token of their prompts. One machine has one monotonic clock.
"""

import time
from array import array
from collections import defaultdict
from pathlib import Path

from runtime_service.engine_core import ModelRunner, PendingStep
from runtime_service.scheduling.output import ModelRunnerOutput, SchedulerOutput


class NotingRunner:
    """Runs steps as `runner` does, and writes to `path` when each one was read and whose tokens it drew."""

    def __init__(self, runner: ModelRunner, path: Path) -> None:
        self._runner = runner
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 - open as long as the process
        self._generations: dict[int, int] = {}

    def warm_up(self) -> None:
        """As the runner does."""
        self._runner.warm_up()

    def use_idle_time(self) -> bool:
        """As the runner does."""
        return self._runner.use_idle_time()

    def execute(self, step: SchedulerOutput) -> "_NotingStep":
        """Launches the step."""
        for new in step.new_sequences:
            self._generations[new.row] = new.token_ids[0]
        drawing = array("q", [self._generations[s.row] for s in step.scheduled if s.is_sampled])
        return _NotingStep(self, self._runner.execute(step), drawing)

    def note(self, drawing: "array[int]") -> None:
        """Writes that these generations have drawn a token now."""
        head = array("d", [time.monotonic()]).tobytes() + array("q", [len(drawing)]).tobytes()
        self._file.write(head + drawing.tobytes())


class _NotingStep:
    def __init__(self, runner: NotingRunner, inner: PendingStep, drawing: "array[int]") -> None:
        self._runner, self._inner, self._drawing = runner, inner, drawing

    def result(self) -> ModelRunnerOutput:
        output = self._inner.result()
        self._runner.note(self._drawing)
        return output


def read_emissions(path: Path) -> dict[int, list[float]]:
    """When each generation's tokens were drawn, in order."""
    times: dict[int, list[float]] = defaultdict(list)
    content, at = path.read_bytes(), 0
    while at + 16 <= len(content):
        (now,), (count,) = array("d", content[at : at + 8]), array("q", content[at + 8 : at + 16])
        for generation in array("q", content[at + 16 : at + 16 + 8 * count]):
            times[generation].append(now)
        at += 16 + 8 * count
    return times
