"""A fleet that is sent ten times what it can hold: what it takes is as soon served as if that were all.

The engines' steps take a fixed time, asleep: how fast queues drain does not depend on how busy the machine is.
"""

import random
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

from shared.errors import from_status
from tests.runtime_service.daemon import Call
from tests.runtime_service.gateway.running_gateway import RunningGateway, running_fleet

NUM_RUNTIMES, ROWS = 2, 4
PROMPT_TOKENS, NEW_TOKENS, STEP_S = 4, 10, 0.024
# On each runtime. All that it holds takes it 20 times 10 steps, two of which are under way at a time: 2.4 s.
NUM_WAITING = 76
ADMITTED = NUM_RUNTIMES * (ROWS + NUM_WAITING)
FACTOR = 10
# The bound.
MOST_LATENESS = 2.0


@dataclass
class _Load:
    """What became of a burst of starts."""

    first_s: dict[str, float] = field(default_factory=dict)
    retry_after_s: list[float] = field(default_factory=list)
    most_waiting_tokens: int = 0

    @property
    def p99_s(self) -> float:
        return statistics.quantiles(self.first_s.values(), n=100)[-1]


async def _sent(fleet: RunningGateway, num_starts: int) -> _Load:
    """So many starts, as fast as they go, and all that was answered."""
    call, load, draw = fleet.call(), _Load(), random.Random(num_starts)
    sent_s: dict[str, float] = {}
    for number in range(num_starts):
        sent_s[str(number)] = time.monotonic()
        prompt = [draw.randrange(300) for _ in range(PROMPT_TOKENS)]
        await call.start(str(number), prompt, max_new_tokens=NEW_TOKENS, ignore_end_tokens=True)
    await call.done()
    while await call.read():
        for event in call.messages[-1].events:
            if event.HasField("tokens") and event.request_id not in load.first_s:
                load.first_s[event.request_id] = time.monotonic() - sent_s[event.request_id]
        waiting = max(daemon.client.waiting_tokens for daemon in fleet.daemons)
        load.most_waiting_tokens = max(load.most_waiting_tokens, waiting)
    for seen in call.seen.values():
        assert seen.num_terminal == 1
        if seen.finished is None:
            error = from_status(seen.error)
            assert error.reason == "QUEUE_FULL"
            load.retry_after_s.append(error.retry_after_s or 0.0)
    assert len(load.first_s) + len(load.retry_after_s) == num_starts
    return load


async def test_ten_times_the_load_leaves_first_tokens_within_twice_those_of_a_full_queue(
    tmp_path: Path,
) -> None:
    """Loads take turns, so that whatever else the machine does is part of both."""
    most_tokens = NUM_WAITING * PROMPT_TOKENS
    options = {"max_sequences": ROWS, "step_s": STEP_S, "max_waiting_tokens": most_tokens}
    async with running_fleet(tmp_path, NUM_RUNTIMES, **options) as fleet:
        full, over = [], []
        for _ in range(2):
            full.append(await _sent(fleet, ADMITTED))
            over.append(await _sent(fleet, FACTOR * ADMITTED))
        for load in over:
            assert load.most_waiting_tokens < most_tokens + PROMPT_TOKENS, (
                "the queue is not bounded"
            )
            assert len(load.first_s) >= 0.9 * ADMITTED, "little was admitted"
            # Later ones are told to come back later, as the line outside is longer.
            assert min(load.retry_after_s) >= 0.1
            assert 1.0 < max(load.retry_after_s) <= 30.0
        ratios = [b.p99_s / a.p99_s for a, b in zip(full, over, strict=True)]
        assert statistics.mean(ratios) <= MOST_LATENESS
        after = Call(fleet.stub.Generate())
        await after.start("after", [40, 41], max_new_tokens=2)
        assert (await after.finish())["after"].reason == "LENGTH"
