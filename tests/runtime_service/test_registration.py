"""Whether Redis answers never matters to a runtime: neither when it is lost, nor when it is mute."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from runtime_service.registration import Registration
from shared.redis import connect
from tests.runtime_service.daemon import HANG_S


class _Mute:
    """A server at the other end of connections that are as good as dead: it takes all, and says nothing."""

    def __init__(self) -> None:
        self.num_connections = 0
        self.has_heard = asyncio.Event()
        self.came_again = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        if self.num_connections > 1:
            self.came_again.set()
        while await reader.read(1 << 12):
            self.has_heard.set()
        writer.close()


@asynccontextmanager
async def registered() -> AsyncIterator[tuple[_Mute, Registration]]:
    """A registration with a server that says nothing."""
    mute = _Mute()
    async with await asyncio.start_server(mute.serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        redis = connect(f"redis://127.0.0.1:{port}/0")
        registration = Registration(redis, "me", lambda: {"state": "serving"}, 0.01)
        registration.start()
        yield mute, registration
        await registration.withdraw()


async def test_mute_redis_does_not_put_a_drain_off() -> None:
    async with registered() as (mute, registration):
        await mute.has_heard.wait()
        async with asyncio.timeout(HANG_S):
            await registration.withdraw()


async def test_heartbeat_that_is_not_answered_is_sent_on_a_new_connection() -> None:
    async with registered() as (mute, _):
        async with asyncio.timeout(HANG_S):
            await mute.came_again.wait()


@pytest.mark.redis
async def test_runtime_registers_after_a_heartbeat_that_failed(redis_url: str) -> None:
    redis, descriptions = connect(redis_url), [None, {"state": "serving"}]

    def describe() -> dict[str, str | int]:
        found = descriptions.pop(0) if len(descriptions) > 1 else descriptions[0]
        if found is None:
            raise RuntimeError("nobody thought of this")
        return dict(found)

    registration = Registration(connect(redis_url), "odd", describe, 60.0)
    registration.start()
    async with asyncio.timeout(HANG_S):
        while not await redis.exists("runtime:odd"):
            pass
    await registration.withdraw()
    await redis.aclose()


@pytest.mark.redis
@pytest.mark.parametrize("num_turns", range(6))
async def test_change_on_the_eve_of_a_withdrawal_does_not_hold_it_up(
    redis_url: str, num_turns: int
) -> None:
    """A drain is a change, and withdraws."""
    redis, key = connect(redis_url), f"runtime:turns-{num_turns}"
    registration = Registration(
        connect(redis_url), f"turns-{num_turns}", lambda: {"state": "serving"}, 60.0
    )
    registration.start()
    while not await redis.exists(key):
        pass
    for _ in range(9):  # until it waits for news
        await redis.ping()
    registration.refresh()
    for _ in range(num_turns):
        await asyncio.sleep(0)
    async with asyncio.timeout(HANG_S):
        await registration.withdraw()
    assert not await redis.exists(key)
    await redis.aclose()
