"""What is new in event streams of Redis: what wakes those who watch builds and operations."""

from collections.abc import Sequence
from typing import Any

from redis.asyncio import Redis

from shared.redis import MAX_BLOCK_S, reachable


class EventTail:
    """What is new in some event streams, from the moment of `start` on."""

    def __init__(self, client: Redis, url: str, keys: Sequence[str]) -> None:
        self._redis: Any = client
        self._url = url
        self._seen = dict.fromkeys(keys, "0-0")

    async def start(self) -> None:
        """Takes everything so far as known; read the state after it, and no change is missed."""
        async with reachable(self._url):
            for key in self._seen:
                for entry, _ in await self._redis.xrevrange(key, count=1):
                    self._seen[key] = entry

    async def wait(self, limit_s: float = MAX_BLOCK_S) -> None:
        """Returns after the next change, or after `limit_s` without one."""
        block = round(min(limit_s, MAX_BLOCK_S) * 1000)
        async with reachable(self._url):
            streams = await self._redis.xread(self._seen, block=block)
        for key, entries in streams:
            self._seen[key] = entries[-1][0]
