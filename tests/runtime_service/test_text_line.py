"""Text waits for threads by turns of tenants: one that floods makes itself wait."""

import asyncio
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from runtime_service.served_engine import EngineText
from runtime_service.start_line import LARGE_START_BYTES, MAX_PREPARED_TOKENS
from runtime_service.text_line import TextLine
from tests.runtime_service.daemon import HANG_S, running_daemon, until
from tests.runtime_service.test_tenants import call_of, security
from tests.shared.key_files import new_key


class _Texts:
    """Texts that wait in a line, and whose had their turns, in order; none is done before the test says so."""

    def __init__(self) -> None:
        self.line = TextLine(1, "test")
        self.order: list[str] = []
        self.go_on = Event()

    def come(self, tenant: str, num_bytes: int = 10) -> asyncio.Task[None]:
        """One more."""
        return asyncio.create_task(self._wait(tenant, num_bytes))

    async def _wait(self, tenant: str, num_bytes: int) -> None:
        async with self.line.turn(tenant, num_bytes):
            self.order.append(tenant)
            assert await self.line.run(partial(self.go_on.wait, HANG_S))


async def test_text_of_another_tenant_waits_for_one_of_a_flood() -> None:
    texts = _Texts()
    tasks = [texts.come("flood") for _ in range(100)]
    await until(lambda: texts.order == ["flood"])
    tasks += [texts.come("quiet") for _ in range(3)]
    await asyncio.sleep(0)
    texts.go_on.set()
    await asyncio.gather(*tasks)
    assert [one[0] for one in texts.order[:8]] == list("fqfqfqff")
    texts.line.close()


@pytest.mark.parametrize(
    ("long", "short", "order"), [(3000, 1000, "lssslsssl"), (30, 10, "lslslslss")]
)
async def test_turns_are_by_bytes_of_which_each_text_has_some(
    long: int, short: int, order: str
) -> None:
    texts = _Texts()
    tasks = [texts.come("long", long) for _ in range(4)]
    await until(lambda: texts.order == ["long"])
    tasks += [texts.come("short", short) for _ in range(9)]
    await asyncio.sleep(0)
    texts.go_on.set()
    await asyncio.gather(*tasks)
    assert [one[0] for one in texts.order[:9]] == list(order)
    texts.line.close()


@pytest.mark.parametrize("number", [0, 1, 2])
async def test_text_that_is_given_up_takes_no_turn_and_keeps_no_thread(number: int) -> None:
    """Wherever it stands: at work, next, or behind others."""
    texts = _Texts()
    tasks = [texts.come("one") for _ in range(4)]
    await until(lambda: texts.order == ["one"])
    tasks[number].cancel()
    await asyncio.wait([tasks[number]])
    texts.go_on.set()
    await asyncio.gather(*(task for task in tasks if task is not tasks[number]))
    assert len(texts.order) == (4 if number == 0 else 3)
    texts.line.close()


class _HeldText:
    """A model's text side that notes what it reads, and reads nothing before the test says so."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.go_on = Event()
        self.order: list[str] = []

    def encode(self, text: str) -> list[int]:
        self.order.append(text[0])
        assert self.go_on.wait(HANG_S)
        found: list[int] = self._model.encode(text)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


@pytest.mark.parametrize("size", [5, LARGE_START_BYTES + 1])
async def test_tenants_start_is_read_in_turn_with_those_of_a_flood(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], size: int
) -> None:
    """By arrival it would be read after all of them; and it finds room where they have filled what there is."""
    keys = [new_key(capsys, tmp_path / "keys", tenant) for tenant in ("flood", "quiet")]
    async with running_daemon(tmp_path, **security(tmp_path / "keys")) as daemon:
        served = daemon.runtime.served
        assert served is not None
        held = _HeldText(served.text.model)
        text = EngineText(held, served.text.vocab_size)  # type: ignore[arg-type]
        daemon.runtime.keeper.served = replace(served, text=text)
        line = daemon.runtime._line
        flood, quiet = (call_of(daemon, key) for key in keys)
        for number in range(40):
            await flood.start(str(number), "f" * size, max_new_tokens=1)
        await until(lambda: len(line._prepared._waiting) == 40)
        line._prepared.add("more of the flood's", "flood", MAX_PREPARED_TOKENS)
        await quiet.start("q", "q" * size, max_new_tokens=1)
        await until(lambda: len(line._prepared._waiting) == 42)
        num_read = len(held.order)
        held.go_on.set()
        await until(lambda: "q" in held.order)
        await quiet.finish()
        await flood.finish()
    assert held.order.index("q") <= num_read + 1
