"""The engine's loop in the benchmark's own process: the real scheduler and overlap, no mailbox and no gRPC."""

import random
import time
from collections import deque
from dataclasses import dataclass, field

from bench.gpu_roofline import Roofline
from runtime_service.engine_core import ModelRunner, PendingStep
from runtime_service.limits import RuntimeLimits
from runtime_service.scheduling.request import Request, SamplingParams, StopParams
from runtime_service.scheduling.scheduler import Scheduler


@dataclass(slots=True)
class Timings:
    """Where the loop's time went, in seconds, and when each request gained tokens."""

    steps: int = 0
    schedule_s: float = 0.0
    execute_s: float = 0.0
    wait_s: float = 0.0
    update_s: float = 0.0
    gained_s: dict[int, list[float]] = field(default_factory=dict)


class Loop:
    """The engine's loop without its mailbox: a step is launched before the previous one is read."""

    def __init__(
        self, runner: ModelRunner, limits: RuntimeLimits, roofline: Roofline | None = None
    ) -> None:
        self.scheduler = Scheduler(limits)
        self._runner = runner
        self._roofline = roofline
        self._unread: deque[PendingStep] = deque()
        self.timings = Timings()
        self.token_ids: dict[int, list[int]] = {}

    def step(self) -> bool:
        """One turn; says whether there was anything to do."""
        t = self.timings
        began = time.perf_counter()
        step = self.scheduler.schedule()
        scheduled = time.perf_counter()
        if step is not None:
            self._unread.append(self._runner.execute(step))
            t.steps += 1
            if self._roofline is not None:
                self._roofline.add(step)
        launched = time.perf_counter()
        t.schedule_s += scheduled - began
        t.execute_s += launched - scheduled
        has_read = False
        while len(self._unread) > (1 if step is not None else 0):
            asked = time.perf_counter()
            drawn = self._unread.popleft().result()
            came = time.perf_counter()
            for output in self.scheduler.update_from(drawn):
                self.token_ids.setdefault(output.request_id, []).extend(output.token_ids)
                t.gained_s.setdefault(output.request_id, []).append(came)
            t.wait_s += came - asked
            t.update_s += time.perf_counter() - came
            has_read = True
        return step is not None or has_read

    def drain(self) -> None:
        """Turns until nothing is left to do."""
        while self.step():
            pass


def request(number: int, prompt_tokens: int, output_tokens: int, vocab_size: int) -> Request:
    """Greedy, over a random prompt that no other request has."""
    pick = random.Random(f"{number} {prompt_tokens} {time.perf_counter_ns()}")
    prompt = [pick.randrange(vocab_size) for _ in range(prompt_tokens)]
    return Request(number, prompt, SamplingParams(), StopParams(output_tokens))
