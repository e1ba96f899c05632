"""What the scheduler costs a step: `schedule` and `update_from`, with a runner that is free.

    python -m bench.scheduler                      1,000 decoding sequences
    python -m bench.scheduler --sequences 256 --profile

Prints milliseconds a step: of the clock, and of this thread's processor time, which other
processes on the machine do not stretch. The bar is 2 ms at 1,000 running sequences.
"""

import argparse
import cProfile
import gc
import pstats
import random
import statistics
import time
from collections import deque

from runtime_service.limits import RuntimeLimits
from runtime_service.scheduling.output import ModelRunnerOutput, SampledSequence, SchedulerOutput
from runtime_service.scheduling.request import Request, SamplingParams, StopParams
from runtime_service.scheduling.scheduler import Scheduler

PROMPT_TOKENS = 64


def main() -> None:
    """Runs one benchmark from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sequences", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    profile = cProfile.Profile() if options.profile else None
    turns = run(options.sequences, options.steps, profile)
    print(f"{options.sequences} sequences, {options.steps} steps, ms a step:")
    for name, costs in zip(("clock", "processor"), zip(*turns, strict=True), strict=True):
        ordered = sorted(cost * 1000 for cost in costs)
        mean, median = statistics.mean(ordered), statistics.median(ordered)
        print(
            f"{name:>10}  mean {mean:.2f}, median {median:.2f}"
            f", p99 {ordered[int(len(ordered) * 0.99)]:.2f}, worst {ordered[-1]:.2f}"
        )
    if profile is not None:
        pstats.Stats(profile).sort_stats("tottime").print_stats(12)


def run(
    num_sequences: int, num_steps: int, profile: cProfile.Profile | None
) -> list[tuple[float, float]]:
    """Seconds of each step in which all sequences decode, one step ahead of the device."""
    random_ = random.Random(0)
    scheduler = Scheduler(_limits(num_sequences, num_steps))
    for request_id in range(num_sequences):
        prompt = [random_.randrange(50_000) for _ in range(PROMPT_TOKENS)]
        sampling = SamplingParams(seed=request_id)
        stop = StopParams(num_steps + 100, end_token_ids=(1, 2))
        scheduler.add(Request(request_id, prompt, sampling, stop))
    unread: deque[ModelRunnerOutput] = deque()
    while scheduler.stats().num_waiting or scheduler.stats().step_tokens != num_sequences:
        _turn(scheduler, unread)
    gc.collect()
    gc.freeze()  # as the engine process does
    if profile is not None:
        profile.enable()
    turns = [_turn(scheduler, unread) for _ in range(num_steps)]
    if profile is not None:
        profile.disable()
    return turns


def _turn(scheduler: Scheduler, unread: deque[ModelRunnerOutput]) -> tuple[float, float]:
    """One turn of the loop; seconds in the scheduler, of the clock and of the processor."""
    before_schedule = _now()
    step = scheduler.schedule()
    after_schedule = _now()
    assert step is not None
    unread.append(_drawn(step))
    before_update = _now()
    if len(unread) > 1:
        scheduler.update_from(unread.popleft())
    after_update = _now()
    clock, processor = (
        after_update[i] - before_update[i] + after_schedule[i] - before_schedule[i] for i in (0, 1)
    )
    return clock, processor


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.thread_time()


def _drawn(step: SchedulerOutput) -> ModelRunnerOutput:
    token_ids = (100 + step.step % 1000,)
    sampled = [SampledSequence(s.row, token_ids) for s in step.scheduled if s.is_sampled]
    return ModelRunnerOutput(step.step, tuple(sampled), {})


def _limits(num_sequences: int, num_steps: int) -> RuntimeLimits:
    max_sequence_tokens = PROMPT_TOKENS + num_steps + 200
    return RuntimeLimits(
        max_sequence_tokens=max_sequence_tokens,
        max_sequences=num_sequences,
        max_step_tokens=max(8192, num_sequences),
        block_tokens=16,
        num_blocks=num_sequences * (max_sequence_tokens // 16 + 1) * 2,
        kv_dtype="bfloat16",
        kv_bytes=0,
        kv_reason="there are no tensors",
    )


if __name__ == "__main__":
    main()
