"""Tells the fleet who serves what, through Redis; whether Redis answers never matters here.

Redis keys:
    runtime:{id}    hash    address, state, engine, model, arch, quant, deployment,
                            running_sequences, waiting_sequences, waiting_tokens, free_blocks,
                            seen_at (Unix seconds); expires three heartbeats after the last one, removed when draining
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from shared.background import Background

# Withdrawing is a courtesy: a Redis that does not answer does not put a drain off. A heartbeat may be
# short in tests, and a new connection takes its time.
_WITHDRAWAL_S = 1.0
_LEAST_TIMEOUT_S = 1.0

_log = structlog.get_logger()


class Registration:
    """Writes a runtime's record at every heartbeat, until it is withdrawn.

    Args:
        describe: gives the record's fields as they stand.
    """

    def __init__(
        self,
        redis: Redis,
        runtime_id: str,
        describe: Callable[[], Mapping[str, str | int]],
        heartbeat_s: float,
    ) -> None:
        self._redis = redis
        self._key = f"runtime:{runtime_id}"
        self._describe = describe
        self._heartbeat_s = heartbeat_s
        self._changed = asyncio.Event()
        self._is_reachable = True
        self._background = Background()
        self._is_started = False

    def start(self) -> None:
        """Registers now and goes on until `withdraw`."""
        self._is_started = True
        self._background.keep("register", self._beat)

    def refresh(self) -> None:
        """Something changed that others should know before the next heartbeat."""
        self._changed.set()

    async def withdraw(self) -> None:
        """Removes the record and stops."""
        if not self._is_started:
            return
        self._is_started = False
        await self._background.close()
        try:
            async with asyncio.timeout(_WITHDRAWAL_S):
                await self._redis.delete(self._key)
        except (RedisError, OSError, TimeoutError):  # then it expires by itself
            _log.warning("withdrawal_failed", key=self._key)
        await self._redis.aclose()

    async def _beat(self) -> None:
        while True:
            self._changed.clear()
            await self._write()
            try:
                # Not asyncio.wait_for: in Python 3.11 it loses a cancellation that comes with a change.
                async with asyncio.timeout(self._heartbeat_s):
                    await self._changed.wait()
            except TimeoutError:  # nothing changed for a heartbeat
                continue

    async def _write(self) -> None:
        record: dict[Any, Any] = {**self._describe(), "seen_at": f"{time.time():.3f}"}
        lifetime_s = 3 * self._heartbeat_s
        try:
            # A connection whose other end is gone without a word is given up, and made anew.
            async with (
                asyncio.timeout(max(lifetime_s, _LEAST_TIMEOUT_S)),
                self._redis.pipeline(transaction=True) as pipeline,
            ):
                pipeline.delete(self._key)
                pipeline.hset(self._key, mapping=record)
                pipeline.pexpire(self._key, round(lifetime_s * 1000))
                await pipeline.execute()
        # Redis remembers who is working and nothing else: generations go on without it.
        except (RedisError, OSError, TimeoutError) as error:
            if self._is_reachable:
                _log.warning("registration_failed", error=type(error).__name__)
            self._is_reachable = False
            return
        if not self._is_reachable:
            _log.info("registration_restored")
        self._is_reachable = True
