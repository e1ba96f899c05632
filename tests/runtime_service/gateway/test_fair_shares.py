"""A tenant that floods a fleet leaves another one its share: of rooms in queues, and of turns."""

import asyncio
from pathlib import Path

import pytest

from shared.errors import from_status
from tests.runtime_service.daemon import Call, until
from tests.runtime_service.gateway.test_tenants import call_of, secured
from tests.shared.key_files import new_key

ROWS, STEP_S, NEW_TOKENS, PROMPT_TOKENS = 4, 0.03, 8, 4
# One runtime's queue holds so many, which takes seconds. The quiet tenant sends fewer than half of that.
NUM_WAITING, NUM_QUIET = 80, 20
NUM_FLOOD = 10 * NUM_QUIET


class Client:
    """A tenant that sends many starts at once, and notes in `first` whose tokens come, in order.

    `num_taken` counts starts that a runtime has taken.
    """

    def __init__(self, call: Call, tenant: str, first: list[str]) -> None:
        self.call, self.first = call, first
        self._tenant = tenant
        self.num_taken = 0

    async def send(self, num_starts: int, begin: int) -> None:
        """Prompts that begin unlike any other."""
        for number in range(num_starts):
            prompt = [40 + begin, *divmod(number, 200), 41]
            await self.call.start(str(number), prompt, max_new_tokens=NEW_TOKENS)
        await self.call.done()

    async def read(self) -> None:
        """Reads to the end."""
        has_first: set[str] = set()
        while await self.call.read():
            for event in self.call.messages[-1].events:
                self.num_taken += event.HasField("started")
                if event.HasField("tokens") and event.request_id not in has_first:
                    has_first.add(event.request_id)
                    self.first.append(self._tenant)

    @property
    def num_refused(self) -> int:
        """Starts that found no room."""
        errors = [seen.error for seen in self.call.seen.values() if seen.error is not None]
        assert {from_status(error).reason for error in errors} <= {"QUEUE_FULL"}
        return len(errors)


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
        first: list[str] = []
        flood, quiet = (
            Client(call_of(fleet, key), tenant, first)
            for key, tenant in zip(keys, ("flood", "quiet"), strict=True)
        )
        reading = [asyncio.create_task(client.read()) for client in (flood, quiet)]
        await flood.send(NUM_FLOOD, begin=0)
        await until(lambda: flood.num_refused)
        num_before = len(first)
        await quiet.send(NUM_QUIET, begin=1)
        await until(lambda: quiet.num_taken == NUM_QUIET or quiet.num_refused)
        num_on_their_way = len(first) - num_before
        await asyncio.gather(*reading)
    assert quiet.num_refused == 0
    since = first[num_before:]
    assert since.count("quiet") == NUM_QUIET
    last = len(since) - 1 - since[::-1].index("quiet")
    # One for each of its own, and what held rows before.
    assert since[num_on_their_way : last + 1].count("flood") <= NUM_QUIET + 2 * ROWS
