"""The runtimes that there are: those that Redis knows, and those that were named.

Redis only introduces them; what a runtime serves and how busy it is it says itself. So a fleet that
has lost Redis goes on with the runtimes it knows, and sees only new ones too late. A runtime is
forgotten when Redis has no record of it, it does not answer, and nothing runs there.

Reads `runtime:{id}`, which runtime_service/registration.py owns.
"""

import asyncio
import time
from collections.abc import Callable, Iterator

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from runtime_service.gateway.runtime_link import LinkOptions, RuntimeLink
from shared.background import Background
from shared.errors import ModelNotServed
from shared.redis import Records
from shared.settings import SettingsError

_log = structlog.get_logger()


class Fleet:
    """Links to all runtimes, kept up to date from `start` to `close`.

    Args:
        redis: None where only `fixed` ones are known.
    Raises:
        SettingsError: calling one of `fixed` would give the gateway's key away.
    """

    def __init__(self, redis: Redis | None, fixed: tuple[str, ...], options: LinkOptions) -> None:
        # None before the first look.
        self._is_redis_there: bool | None = None
        self._redis = redis
        self._addresses = (
            None if redis is None else Records(redis, lambda _, fields: fields["address"])
        )
        self._options = options
        self._links: dict[str, RuntimeLink] = {}
        self._passed_over: set[str] = set()
        self._listeners: list[Callable[[], None]] = []
        self._background = Background()
        for address in fixed:
            self._add(address, is_fixed=True)

    @property
    def redis_answers(self) -> bool:
        """Claims that it answered when it was last asked."""
        return bool(self._is_redis_there)

    def on_change(self, listener: Callable[[], None]) -> None:
        """Has `listener` called when a runtime came, went, or changed in what it takes."""
        self._listeners.append(listener)

    def __iter__(self) -> Iterator[RuntimeLink]:
        return iter(self._links.values())

    def models(self) -> dict[str, RuntimeLink]:
        """What may be asked for by name, sorted: deployments and models, each with a runtime."""
        found: dict[str, RuntimeLink] = {}
        for link in self:
            for name in (link.status.deployment, link.status.engine.model):
                if name and link.is_usable:
                    found.setdefault(name, link)
        return dict(sorted(found.items()))

    def check_model(self, model: str) -> None:
        """Raises ModelNotServed where others are served, and none of that name.

        While nothing is, one may be about to be: generations know how to wait for it.
        """
        known = self.models()
        if known and not any(link.serves(model) for link in self):
            raise ModelNotServed(model=model, known=", ".join(known))

    def start(self) -> None:
        """Follows Redis from now on."""
        self._background.keep("follow_fleet", self._follow)

    async def close(self) -> None:
        """Leaves every runtime."""
        await self._background.close()
        await asyncio.gather(*(link.close() for link in self._links.values()))

    async def _follow(self) -> None:
        while True:
            began_s = time.monotonic()
            addresses = await self._registered()
            if addresses is not None:
                await self._meet(addresses)
            await asyncio.sleep(max(self._options.poll_s - (time.monotonic() - began_s), 0))

    async def _registered(self) -> set[str] | None:
        """Addresses that Redis knows; None while it does not answer."""
        if self._redis is None or self._addresses is None:
            return None
        try:
            async with asyncio.timeout(max(5 * self._options.poll_s, 2.0)):
                found = await self._addresses.read_all("runtime:*")
        # Redis remembers who is working and nothing else: generations go on without it.
        except (RedisError, OSError, TimeoutError) as error:
            if self._is_redis_there is not False:
                _log.warning("redis_lost", error=type(error).__name__)
            self._is_redis_there = False
            return None
        if self._is_redis_there is False:
            _log.info("redis_found")
        self._is_redis_there = True
        return {address for address in found.values() if address}

    async def _meet(self, addresses: set[str]) -> None:
        self._passed_over &= addresses
        for address in addresses - self._links.keys():
            try:
                self._add(address)
            except (SettingsError, OSError) as error:  # TLS files are read, and may be away
                if address not in self._passed_over:
                    _log.error("runtime_passed_over", runtime=address, problem=str(error))
                self._passed_over.add(address)
        gone = [
            link
            for link in self._links.values()
            if not (link.is_fixed or link.answers or link.num_runs)
            and link.address not in addresses
        ]
        for link in gone:
            _log.info("runtime_forgotten", runtime=link.address)
            del self._links[link.address]
            await link.close()
        if gone:
            self._changed()

    def _add(self, address: str, *, is_fixed: bool = False) -> None:
        link = RuntimeLink(address, self._options, self._changed, is_fixed=is_fixed)
        self._links[address] = link
        link.start()
        _log.info("runtime_met", runtime=address)

    def _changed(self) -> None:
        for listener in self._listeners:
            listener()
