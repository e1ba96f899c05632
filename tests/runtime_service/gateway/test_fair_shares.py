"""A tenant that floods a fleet leaves another one its share: of rooms in queues, and of turns."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from runtime_service.engine_client import EngineClient
from runtime_service.engine_messages import StepOutputs
from runtime_service.scheduling.request import Request
from shared.errors import from_status
from tests.runtime_service.daemon import Call, until
from tests.runtime_service.gateway.test_tenants import call_of, secured
from tests.shared.key_files import new_key

ROWS, STEP_S, NEW_TOKENS, PROMPT_TOKENS = 4, 0.03, 8, 4
# One runtime's queue holds so many, which takes seconds. The quiet tenant sends fewer than half of that.
NUM_WAITING, NUM_QUIET = 80, 20
NUM_FLOOD = 10 * NUM_QUIET


class Turns:
    """Whose prompts an engine begins: `begun`, by tenant, in its own order.

    Clients hear of their first tokens each on a call of its own, and those who hear late hear of many at once.
    `begun[:num_unknowing]` was before the engine knew of all that is sent by `quiet`.
    """

    def __init__(self, client: EngineClient) -> None:
        self.begun: list[str] = []
        self.num_unknowing: int | None = None
        self._tenants: dict[int, str] = {}
        self._num_commands: int | None = None
        self._client, self._submit, self._take = client, client.submit, client._take
        client.submit = self._note_submitted  # type: ignore[method-assign]
        client._take = self._note_step  # type: ignore[method-assign]

    def _note_submitted(self, request: Request, *rest: Any) -> None:
        self._submit(request, *rest)
        self._tenants[request.request_id] = request.cache_salt
        if list(self._tenants.values()).count("quiet") == NUM_QUIET and self._num_commands is None:
            self._num_commands = self._client._num_sent + len(self._client._outbox)

    def _note_step(self, step: StepOutputs) -> None:
        is_known = self._num_commands is not None and step.num_commands >= self._num_commands
        if is_known and self.num_unknowing is None:
            self.num_unknowing = len(self.begun)
        for output in step.outputs:
            if output.num_cached_tokens is not None:  # its first
                self.begun.append(self._tenants[output.request_id])
        self._take(step)


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
        turns = Turns(fleet.daemons[0].client)
        flood, quiet = (call_of(fleet, key) for key in keys)
        reading = [asyncio.create_task(call.read_rest()) for call in (flood, quiet)]
        await send(flood, NUM_FLOOD, begin=0)
        await until(lambda: num_refused(flood))
        await send(quiet, NUM_QUIET, begin=1)
        await asyncio.gather(*reading)
    assert num_refused(quiet) == 0
    assert turns.begun.count("quiet") == NUM_QUIET
    assert turns.num_unknowing is not None
    last = len(turns.begun) - 1 - turns.begun[::-1].index("quiet")
    # One for each of its own, and what held rows before.
    assert turns.begun[turns.num_unknowing : last + 1].count("flood") <= NUM_QUIET + 2 * ROWS
