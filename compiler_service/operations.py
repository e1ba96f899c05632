"""Operations: what calls of BuildEngine have asked for. Their keys in Redis:

pattern                    type    content                              lifetime
operation:{digest}         hash    request, state, keys, error          7 days; a minute while it
                                                                        is RESOLVING, renewed by
                                                                        the daemon that does so
operation:{digest}:events  stream  one entry a change: wakes watchers   as its record
"""

import base64
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from google.rpc import status_pb2
from millrace.compiler.v1 import compiler_pb2
from redis.asyncio import Redis

from shared.engine import EngineKey
from shared.errors import BuildNotFound
from shared.redis import reachable

RESOLVING, RESOLVED, FAILED = "RESOLVING", "RESOLVED", "FAILED"
KEPT_S = 7 * 24 * 3600
RESOLVING_KEPT_S = 60
_PREFIX = "operations/"

# KEYS operation  ARGV kept_s, is_start, (field, value)...  -> 0 if another daemon resolves it
_WRITE = """
local is_start = ARGV[2] == '1'
if is_start and redis.call('HGET', KEYS[1], 'state') == 'RESOLVING' then return 0 end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], unpack(ARGV, 3))
local events = KEYS[1] .. ':events'
redis.call('XADD', events, 'MAXLEN', '~', 64, '*', 'state', redis.call('HGET', KEYS[1], 'state'))
redis.call('EXPIRE', events, ARGV[1])
redis.call('EXPIRE', KEYS[1], ARGV[1])
return 1
"""

# KEYS operation  ARGV kept_s  -> its state, '' if there is no record of it
_RENEW = """
local state = redis.call('HGET', KEYS[1], 'state')
if state == 'RESOLVING' then redis.call('EXPIRE', KEYS[1], ARGV[1]) end
return state or ''
"""


@dataclass(frozen=True, slots=True)
class OperationRecord:
    """An operation as it stands; `keys` in the order of the request, with "was it cached"."""

    request: compiler_pb2.BuildEngineRequest
    state: str
    keys: tuple[tuple[EngineKey, bool], ...] = ()
    error: status_pb2.Status | None = None

    @property
    def name(self) -> str:
        """Resource name: equal requests are one operation."""
        text = self.request.SerializeToString(deterministic=True)
        return _PREFIX + hashlib.sha256(text).hexdigest()[:32]


class Operations:
    """The operations in a Redis; raises RedisUnreachable where it does not answer."""

    def __init__(self, client: Redis, url: str) -> None:
        self._redis: Any = client
        self._url = url
        self._script = client.register_script(_WRITE)
        self._renew_script = client.register_script(_RENEW)

    async def begin(self, record: OperationRecord) -> bool:
        """Notes that this daemon resolves the request; False where one does already."""
        return await self._write(record, RESOLVING_KEPT_S, is_start=True)

    async def renew(self, record: OperationRecord) -> None:
        """Says that it is still being resolved, unless it was resolved elsewhere."""
        async with reachable(self._url):
            state = await self._renew_script(keys=[_key(record.name)], args=[RESOLVING_KEPT_S])
        if not state:  # Redis lost its data, or was away for too long
            await self.begin(record)

    async def write(self, record: OperationRecord) -> None:
        """Keeps the record in its last state."""
        await self._write(record, KEPT_S, is_start=False)

    async def get(self, name: str) -> OperationRecord:
        """The operation of that name.

        Raises:
            BuildNotFound: there is no record of it.
        """
        async with reachable(self._url):
            raw = await self._redis.hgetall(_key(name)) if name.startswith(_PREFIX) else {}
        if not raw:
            raise BuildNotFound(build=name, kept="7 days")
        error = raw.get("error")
        return OperationRecord(
            compiler_pb2.BuildEngineRequest.FromString(base64.b64decode(raw["request"])),
            raw["state"],
            tuple((EngineKey.from_dict(key), cached) for key, cached in json.loads(raw["keys"])),
            None if error is None else status_pb2.Status.FromString(base64.b64decode(error)),
        )

    async def _write(self, record: OperationRecord, kept_s: int, is_start: bool) -> bool:
        request = record.request.SerializeToString(deterministic=True)
        fields = [
            "request", base64.b64encode(request).decode(),
            "state", record.state,
            "keys", json.dumps([(key.to_dict(), cached) for key, cached in record.keys]),
        ]  # fmt: skip
        if record.error is not None:
            fields += ["error", base64.b64encode(record.error.SerializeToString()).decode()]
        async with reachable(self._url):
            arguments: list[Any] = [kept_s, int(is_start), *fields]
            return bool(await self._script(keys=[_key(record.name)], args=arguments))


def events_key(name: str) -> str:
    """Where the changes of an operation are told."""
    return f"{_key(name)}:events"


def _key(name: str) -> str:
    return f"operation:{name.removeprefix(_PREFIX)}"
