"""A tenant that floods a fleet leaves another one its share: of rooms in queues, and of turns."""

import asyncio
from pathlib import Path

import pytest

from shared.errors import from_status
from tests.runtime_service.daemon import Call, until
from tests.runtime_service.engine_order import EngineOrder
from tests.runtime_service.gateway.test_tenants import call_of, secured
from tests.shared.key_files import new_key

ROWS, STEP_S, NEW_TOKENS, PROMPT_TOKENS = 4, 0.03, 8, 4
# One runtime's queue holds so many, which takes seconds. The quiet tenant sends fewer than half of that.
NUM_WAITING, NUM_QUIET = 80, 20
NUM_FLOOD = 10 * NUM_QUIET


def num_refused(call: Call) -> int:
    """Starts that found no room."""
    errors = [seen.error for seen in call.seen.values() if seen.error is not None]
    assert {from_status(error).reason for error in errors} <= {"QUEUE_FULL"}
    return len(errors)


async def send(call: Call, num_starts: int, begin: int) -> None:
    """Many starts at once, whose prompts begin unlike any other."""
    for number in range(num_starts):
        prompt = [40 + begin, *divmod(number, 200), 41]
        await call.start(str(number), prompt, max_new_tokens=NEW_TOKENS)
    await call.done()


async def test_quiet_tenant_has_its_first_tokens_as_if_it_had_half_of_the_fleet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The queue is full of another's starts when its own come: none is refused, and each waits for as many of theirs
    as there are of its own. In order of arrival it would wait for all of them."""
    keys = [new_key(capsys, tmp_path / "keys", tenant) for tenant in ("flood", "quiet")]
    options = {
        "max_sequences": ROWS,
        "step_s": STEP_S,
        "max_waiting_tokens": NUM_WAITING * PROMPT_TOKENS,
    }
    async with secured(
        tmp_path, capsys, "generate", "delegate", num_runtimes=1, **options
    ) as fleet:
        order = EngineOrder(fleet.daemons[0].client)
        flood, quiet = (call_of(fleet, key) for key in keys)
        reading = [asyncio.create_task(call.read_rest()) for call in (flood, quiet)]
        await send(flood, NUM_FLOOD, begin=0)
        await until(lambda: num_refused(flood))
        await send(quiet, NUM_QUIET, begin=1)
        await asyncio.gather(*reading)
    assert num_refused(quiet) == 0
    quiet_ones = [one for one in order.begun if one.tenant == "quiet"]
    assert len(quiet_ones) == NUM_QUIET
    # From where the engine knows of all of them to where it begins the last one.
    known_step = max(one.known_step for one in quiet_ones)
    meanwhile = order.begun[: order.begun.index(quiet_ones[-1])]
    flood_meanwhile = [
        one for one in meanwhile if one.tenant == "flood" and one.first_step >= known_step
    ]
    # One for each of its own, and what held rows before.
    assert len(flood_meanwhile) <= NUM_QUIET + 2 * ROWS
