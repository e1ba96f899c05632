"""What runtimes are to serve, as it is written down in Redis, and who of them does.

Redis keys:
    deployment:{name}           hash    model, quant, model_uri, replicas, version; written when it
                                        is deployed. Undeployed it has 0 replicas and expires after
                                        a day: that it is absent is no command, so a Redis that came
                                        back empty stops nobody
    deployment:{name}:slot:{i}  string  id of the runtime that is replica i of it; expires when that
                                        one is silent
    deployment:{name}:roll      string  id of the runtime that exchanges its engine now; expires
                                        likewise
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from redis.asyncio import Redis

from runtime_service.settings import quant_named
from shared.engine import QuantConfig
from shared.errors import MillraceError
from shared.redis import Records

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_PREFIX = "deployment:"
_UNDEPLOYED_S = 86_400

# KEYS: the hash. ARGV: model, quant, model_uri, replicas, a version that was given. Gives the version, a later one.
# What is no hash is nobody's.
_APPLY = """
if redis.call('TYPE', KEYS[1]).ok ~= 'hash' then redis.call('DEL', KEYS[1]) end
redis.call('HSET', KEYS[1], 'model', ARGV[1], 'quant', ARGV[2], 'model_uri', ARGV[3],
           'replicas', ARGV[4])
redis.call('PERSIST', KEYS[1])
local version = math.max(tonumber(redis.call('HGET', KEYS[1], 'version')) or 0, tonumber(ARGV[5])) + 1
redis.call('HSET', KEYS[1], 'version', version)
return version
"""
# KEYS: the hash. ARGV: seconds that it is remembered. Whether there was one.
_DELETE = """
if redis.call('TYPE', KEYS[1]).ok ~= 'hash' then return 0 end
if tonumber(redis.call('HGET', KEYS[1], 'replicas') or 0) == 0 then return 0 end
redis.call('HSET', KEYS[1], 'replicas', 0)
redis.call('EXPIRE', KEYS[1], ARGV[1])
return 1
"""
# KEYS: what may be held, best first. ARGV: holder, milliseconds. Which one it holds, from 1; 0: none.
_HOLD = """
local free = 0
for i = #KEYS, 1, -1 do
  local holder = redis.call('GET', KEYS[i])
  if holder == ARGV[1] then
    redis.call('PEXPIRE', KEYS[i], ARGV[2])
    return i
  end
  if not holder then free = i end
end
if free > 0 then redis.call('SET', KEYS[free], ARGV[1], 'PX', ARGV[2]) end
return free
"""
# KEYS: what may be held. ARGV: holder.
_RELEASE = """
for i = 1, #KEYS do
  if redis.call('GET', KEYS[i]) == ARGV[1] then redis.call('DEL', KEYS[i]) end
end
"""


@dataclass(frozen=True, slots=True)
class Deployment:
    """What a number of runtimes are to serve; see millrace.fleet.v1."""

    name: str
    model: str
    quant: QuantConfig
    model_uri: str
    replicas: int
    version: int = 0


@dataclass(frozen=True, slots=True)
class DeploymentProblem:
    """Why a runtime does not serve `deployment`, as that version has it.

    Args:
        error: with the delay after which the runtime tries again; None where it does not.
    """

    deployment: Deployment
    error: MillraceError


def is_deployment_name(name: str) -> bool:
    """Claims that a deployment may be called so."""
    return _NAME.fullmatch(name) is not None


class Deployments:
    """Deployments in Redis; every method raises redis-py's errors."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._records = Records(redis, _deployment)
        self._apply = redis.register_script(_APPLY)
        self._delete = redis.register_script(_DELETE)
        self._hold = redis.register_script(_HOLD)
        self._release = redis.register_script(_RELEASE)

    async def apply(self, wanted: Deployment, last_version: int = 0) -> int:
        """Writes it down; gives its new version.

        Args:
            last_version: that a runtime is known to serve; a Redis that lost its data does not remember it.
        """
        values: list[str | int] = [
            wanted.model,
            str(wanted.quant),
            wanted.model_uri,
            wanted.replicas,
            last_version,
        ]
        return int(await self._apply(keys=[_key(wanted.name)], args=values))

    async def delete(self, name: str) -> bool:
        """Has nobody serve it; false where there is none."""
        return bool(await self._delete(keys=[_key(name)], args=[_UNDEPLOYED_S]))

    async def get(self, name: str) -> Deployment | None:
        """The deployment; with 0 replicas where it was undeployed not long ago."""
        return (await self._records.read([_key(name)])).get(_key(name))

    async def list(self) -> "list[Deployment]":
        """All that somebody is to serve, by name."""
        found = await self._records.read_all(f"{_PREFIX}*", lambda key: key.count(":") == 1)
        return [deployment for deployment in found.values() if deployment.replicas]

    async def hold_slot(self, wanted: Deployment, runtime_id: str, ttl_s: float) -> bool:
        """Makes the runtime one of its replicas, for that long; false where it has enough."""
        keys = _slots(wanted)
        held = await self._hold(keys=keys, args=[runtime_id, round(ttl_s * 1000)]) if keys else 0
        return bool(held)

    async def release(self, wanted: Deployment, runtime_id: str) -> None:
        """Makes the runtime none of its replicas."""
        keys = [*_slots(wanted), _roll(wanted.name)]
        await self._release(keys=keys, args=[runtime_id])

    async def hold_roll(self, name: str, runtime_id: str, ttl_s: float) -> bool:
        """Lets the runtime exchange its engine, for that long; false where another one does."""
        args: list[str | int] = [runtime_id, round(ttl_s * 1000)]
        return bool(await self._hold(keys=[_roll(name)], args=args))

    async def end_roll(self, name: str, runtime_id: str) -> None:
        """Lets the next one exchange its engine."""
        await self._release(keys=[_roll(name)], args=[runtime_id])


def _deployment(key: str, fields: Mapping[str, str]) -> Deployment:
    """The deployment of a record; raises KeyError or ValueError where it makes no sense."""
    return Deployment(
        key.removeprefix(_PREFIX),
        fields["model"],
        quant_named(fields["quant"]),
        fields["model_uri"],
        int(fields["replicas"]),
        int(fields["version"]),
    )


def _key(name: str) -> str:
    return _PREFIX + name


def _slots(wanted: Deployment) -> list[str]:
    return [f"{_key(wanted.name)}:slot:{index}" for index in range(wanted.replicas)]


def _roll(name: str) -> str:
    return f"{_key(name)}:roll"
