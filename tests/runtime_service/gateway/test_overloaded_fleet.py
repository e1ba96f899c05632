"""A fleet that is sent ten times what it can hold: what it takes is as soon served as if that were all.

The engines' steps take a fixed time, asleep: how fast queues drain does not depend on how busy the machine is. How soon
is counted in these steps, from where an engine knows of a start; that nothing waits for that elsewhere is seen apart.
"""

import random
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from shared.errors import from_status
from tests.runtime_service.daemon import Call
from tests.runtime_service.engine_order import EngineOrder
from tests.runtime_service.gateway.running_gateway import RunningGateway, running_fleet

NUM_RUNTIMES, ROWS = 2, 4
PROMPT_TOKENS, NEW_TOKENS, STEP_S = 4, 10, 0.024
# On each runtime. All that it holds takes it 20 times 10 steps, two of which are under way at a time: 2.4 s.
NUM_WAITING = 76
FULL_STEPS = (ROWS + NUM_WAITING) // ROWS * NEW_TOKENS
ADMITTED = NUM_RUNTIMES * (ROWS + NUM_WAITING)
FACTOR = 10
# The bound.
MOST_LATENESS = 2.0


@dataclass
class _Load:
    """What became of a burst of starts."""

    first_steps: list[int] = field(default_factory=list)
    retry_after_s: list[float] = field(default_factory=list)
    most_waiting_tokens: int = 0

    @property
    def p99_steps(self) -> float:
        return statistics.quantiles(self.first_steps, n=100)[-1]


async def _sent(fleet: RunningGateway, orders: list[EngineOrder], num_starts: int) -> _Load:
    """So many starts, as fast as they go, and all that was answered."""
    call, load, draw = fleet.call(), _Load(), random.Random(num_starts)
    for order in orders:
        order.begun.clear()
    for number in range(num_starts):
        prompt = [draw.randrange(300) for _ in range(PROMPT_TOKENS)]
        await call.start(str(number), prompt, max_new_tokens=NEW_TOKENS, ignore_end_tokens=True)
    await call.done()
    while await call.read():
        assert not fleet.gateway._waiting, "a start waits where there is no queue"
        waiting = max(daemon.client.waiting_tokens for daemon in fleet.daemons)
        load.most_waiting_tokens = max(load.most_waiting_tokens, waiting)
    for seen in call.seen.values():
        assert seen.num_terminal == 1
        if seen.finished is None:
            error = from_status(seen.error)
            assert error.reason == "QUEUE_FULL"
            load.retry_after_s.append(error.retry_after_s or 0.0)
    load.first_steps = [one.first_step - one.known_step for order in orders for one in order.begun]
    assert len(load.first_steps) + len(load.retry_after_s) == num_starts
    return load


async def test_ten_times_the_load_leaves_first_tokens_within_twice_those_of_a_full_queue(
    tmp_path: Path,
) -> None:
    most_tokens = NUM_WAITING * PROMPT_TOKENS
    options = {"max_sequences": ROWS, "step_s": STEP_S, "max_waiting_tokens": most_tokens}
    async with running_fleet(tmp_path, NUM_RUNTIMES, **options) as fleet:
        orders = [EngineOrder(daemon.client) for daemon in fleet.daemons]
        for _ in range(2):
            load = await _sent(fleet, orders, FACTOR * ADMITTED)
            assert load.most_waiting_tokens < most_tokens + PROMPT_TOKENS, (
                "the queue is not bounded"
            )
            assert len(load.first_steps) >= 0.9 * ADMITTED, "little was admitted"
            # Later ones are told to come back later, as the line outside is longer.
            assert min(load.retry_after_s) >= 0.1
            assert 1.0 < max(load.retry_after_s) <= 30.0
            assert load.p99_steps <= MOST_LATENESS * FULL_STEPS
        after = Call(fleet.stub.Generate())
        await after.start("after", [40, 41], max_new_tokens=2)
        assert (await after.finish())["after"].reason == "LENGTH"
