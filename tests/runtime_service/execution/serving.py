"""The engine's loop in a test: requests through the real scheduler and a runner."""

from collections import deque
from dataclasses import replace

from runtime_service.engine_core import ModelRunner, PendingStep
from runtime_service.engine_messages import SampleOutput
from runtime_service.limits import RuntimeLimits
from runtime_service.scheduling.request import Request
from runtime_service.scheduling.scheduler import Scheduler

Gained = dict[tuple[int, int], list[SampleOutput]]


def serve(
    runner: ModelRunner,
    limits: RuntimeLimits,
    requests: list[Request],
    max_unread: int,
    aborted: dict[int, int] | None = None,
) -> tuple[Gained, Scheduler]:
    """All requests, arriving over the first steps; what each gained. `aborted`: request by step."""
    scheduler = Scheduler(limits)
    waiting, unread = deque(requests), deque[PendingStep]()
    gained: Gained = {}
    turn = 0
    while True:
        if waiting:
            scheduler.add(replace(waiting[0], prompt_token_ids=[*waiting[0].prompt_token_ids]))
            waiting.popleft()
        if aborted and turn in aborted:
            scheduler.abort(aborted[turn])
        turn += 1
        step = scheduler.schedule()
        if step is not None:
            unread.append(runner.execute(step))
        is_idle = step is None and not unread and not waiting
        while len(unread) > (max_unread if step is not None else 0):
            for output in scheduler.update_from(unread.popleft().result()):
                gained.setdefault((output.request_id, output.sample_index), []).append(output)
        if is_idle:  # what was read may have let others in
            return gained, scheduler


def tokens_of(outputs: list[SampleOutput]) -> list[int]:
    """What a sample gained, in one list."""
    return [token for output in outputs for token in output.token_ids]
