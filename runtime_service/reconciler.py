"""Has a runtime serve what its deployment says, now and after every change.

A runtime is a member of the deployment that it was started for, or, idle, of any that lacks a
replica. A member that serves nothing loads at once; one that serves an older version exchanges its
engine when no other member does: the rest takes what comes meanwhile, and what runs is finished.
A version whose engine can never be made is left alone until another one is deployed; what else
failed is tried again, ever less often.
Losing Redis changes nothing: it goes on with what it serves.
"""

import asyncio
import math
from dataclasses import dataclass

import structlog
from millrace.runtime.v1 import runtime_pb2 as pb
from redis.exceptions import RedisError

from runtime_service.deployments import Deployment, DeploymentProblem, Deployments
from runtime_service.runtime import Runtime
from shared.background import Background
from shared.engine import EngineSelector
from shared.errors import (
    InvalidField,
    InvalidModel,
    MillraceError,
    ModelNotFound,
    QualityGate,
    UnsupportedArch,
    UnsupportedModel,
    UnsupportedQuant,
    UnsupportedTp,
)

_FIRST_RETRY_S, _LAST_RETRY_S = 1.0, 30.0
# Before an idle runtime tries a version again that it was not fit for: its engine may have been pushed or signed since.
_UNFIT_S = 300.0
# What a checkpoint and a recipe are at fault for: another build of them ends as the last one did.
_FINAL = (
    QualityGate, InvalidModel, UnsupportedModel, ModelNotFound, UnsupportedArch, UnsupportedQuant, UnsupportedTp,
    InvalidField,
)  # fmt: skip

_log = structlog.get_logger()


@dataclass(slots=True)
class _Attempt:
    """A version that is being loaded."""

    wanted: Deployment
    loading: asyncio.Task[None]


class Reconciler:
    """Follows a deployment; `run` until it is cancelled, then `leave`.

    Args:
        name: the deployment; "": one that lacks a replica, as long as the runtime is idle.
        interval_s: between looks.
        ttl_s: after which a silent member's place is another one's.
        unfit_s: for which an idle runtime leaves a version to others that it could not serve; and the longest wait
            of a member before it tries again what its error does not say will pass.
    """

    def __init__(
        self,
        runtime: Runtime,
        deployments: Deployments,
        runtime_id: str,
        name: str,
        interval_s: float,
        ttl_s: float,
        unfit_s: float = _UNFIT_S,
    ) -> None:
        self._runtime = runtime
        self._deployments = deployments
        self._id = runtime_id
        self._own_name = name
        self._interval_s, self._ttl_s, self._unfit_s = interval_s, ttl_s, unfit_s
        self._member_of: Deployment | None = None
        # What it serves, or served before somebody had it unloaded. Versions alone do not say: a Redis that came back
        # empty counts them anew.
        self._followed: Deployment | None = None
        # What it has going on, besides looking: the next look takes its results.
        self._background = Background()
        self._attempt: _Attempt | None = None
        self._unloading: asyncio.Task[None] | None = None
        # Versions that an idle runtime could not serve, until when; and when a member tries again what it could not.
        self._unfit: dict[Deployment, float] = {}
        self._retry_at_s = 0.0
        self._retry_s = _FIRST_RETRY_S

    async def run(self) -> None:
        """Looks again and again."""
        is_reachable = True
        while True:
            try:
                async with asyncio.timeout(self._ttl_s):
                    await self.look()
                is_reachable = True
            except (RedisError, OSError, TimeoutError) as error:
                if is_reachable:
                    _log.warning("deployment_not_seen", error=type(error).__name__)
                is_reachable = False
            await asyncio.sleep(self._interval_s)

    async def leave(self) -> None:
        """Gives its place to another one."""
        if self._attempt is not None:
            self._attempt.loading.cancel()
        if self._unloading is not None:
            self._unloading.cancel()
        if self._member_of is not None:
            try:
                async with asyncio.timeout(1.0):
                    await self._deployments.release(self._member_of, self._id)
            except (RedisError, OSError, TimeoutError):  # then it expires by itself
                _log.warning("place_not_released", deployment=self._member_of.name)

    async def look(self) -> None:
        """Does the next step towards what is wanted."""
        if self._unloading is not None:
            if not self._unloading.done():
                return
            unloaded, self._unloading = self._unloading, None
            unloaded.result()
        wanted = await self._wanted()
        if wanted is None:
            return
        self._forget_problem_unless_of(wanted)
        if not await self._deployments.hold_slot(wanted, self._id, self._ttl_s):
            self._forget_problem_unless_of()
            await self._drop_out(wanted)
            return
        self._member_of = wanted
        runtime = self._runtime
        runtime.deployment = wanted.name
        if self._attempt is not None:
            if not _asks_for_the_same(self._attempt.wanted, wanted):
                # What it waits for, a build or what runs, nobody wants any more; a version that is right need not wait.
                self._attempt.loading.cancel()
            await self._follow(self._attempt)
        elif self._followed != wanted or runtime.state == pb.RUNTIME_STATE_IDLE:
            # Also where somebody had it unload what it served: the deployment says what is to be.
            await self._begin(wanted)

    async def _wanted(self) -> Deployment | None:
        """What it is to serve, or may be; None: nobody says."""
        name = self._own_name or (self._member_of.name if self._member_of else "")
        if name:
            return await self._deployments.get(name)
        if self._runtime.state != pb.RUNTIME_STATE_IDLE:
            self._forget_problem_unless_of()
            return None
        now_s = asyncio.get_running_loop().time()
        known = await self._deployments.list()
        self._unfit = {
            version: until_s
            for version, until_s in self._unfit.items()
            if until_s > now_s and version in known
        }
        self._forget_problem_unless_of(*known)
        for deployment in known:
            if deployment in self._unfit:
                continue
            if await self._deployments.hold_slot(deployment, self._id, self._ttl_s):
                return deployment
        return None

    async def _begin(self, wanted: Deployment) -> None:
        now_s = asyncio.get_running_loop().time()
        if self._runtime.deployment_problem is not None and now_s < self._retry_at_s:
            return  # it is what `wanted` suffers from
        if self._runtime.served is not None and not await self._deployments.hold_roll(
            wanted.name, self._id, self._ttl_s
        ):
            return
        _log.info("deployment_followed", deployment=wanted.name, version=wanted.version)
        self._attempt = _Attempt(wanted, self._background.own(self._load(wanted)))

    async def _load(self, wanted: Deployment) -> None:
        selector = EngineSelector(wanted.model, self._runtime.arch, wanted.quant)
        await self._runtime.load(selector, wanted.model_uri, anew=False)
        self._runtime.deployment_version, self._followed = wanted.version, wanted
        self._forget_problem_unless_of()

    async def _follow(self, attempt: _Attempt) -> None:
        """Keeps its turn while it loads; afterwards lets the next one."""
        name = attempt.wanted.name
        if not attempt.loading.done():
            await self._deployments.hold_roll(name, self._id, self._ttl_s)
            return
        # What became of it is noted before Redis is asked, which may be away.
        self._attempt = None
        is_unfit = self._note(attempt)
        await self._deployments.end_roll(name, self._id)
        if is_unfit:
            await self._drop_out(attempt.wanted)

    def _note(self, attempt: _Attempt) -> bool:
        """Takes note of how an attempt ended; whether this runtime is not fit for that version."""
        if attempt.loading.cancelled():
            return False
        wanted, error = attempt.wanted, attempt.loading.exception()
        if error is None:
            self._retry_s = _FIRST_RETRY_S
            return False
        if not isinstance(error, MillraceError):
            raise error
        _log.error(
            "deployment_not_served",
            deployment=wanted.name,
            version=wanted.version,
            reason=error.reason,
            problem=str(error),
        )
        may_pass = error.retry_after_s is not None
        is_unfit = not (self._own_name or may_pass or self._runtime.served is not None)
        retry_s = self._unfit_s if is_unfit else self._retry_s
        if isinstance(error, _FINAL):
            retry_s = math.inf
        else:
            # Its own delay is until a caller may ask again, which is not when this asks.
            error = type(error)(retry_after_s=retry_s, **error.fields)
        self._runtime.deployment_problem = DeploymentProblem(wanted, error)
        self._retry_at_s = asyncio.get_running_loop().time() + retry_s
        # A build that fails by itself costs more than a look for a daemon that is away.
        longest_s = _LAST_RETRY_S if may_pass else self._unfit_s
        self._retry_s = min(self._retry_s * 2, longest_s)
        if is_unfit:
            self._unfit[wanted] = self._retry_at_s
        return is_unfit

    def _forget_problem_unless_of(self, *wanted: Deployment) -> None:
        problem = self._runtime.deployment_problem
        if problem is not None and problem.deployment not in wanted:
            self._runtime.deployment_problem = None

    async def _drop_out(self, deployment: Deployment) -> None:
        """Serves nothing: there are members enough, or it does not fit."""
        await self._deployments.release(deployment, self._id)
        was_member, self._member_of, self._followed = self._member_of is not None, None, None
        if was_member:
            _log.info("deployment_left", deployment=deployment.name)
            if self._attempt is not None:
                self._attempt.loading.cancel()
                self._attempt = None
            self._runtime.deployment, self._runtime.deployment_version = "", 0
            # What runs is finished first, which takes its time.
            self._unloading = self._background.own(self._runtime.unload())


def _asks_for_the_same(one: Deployment, other: Deployment) -> bool:
    return (one.model, one.quant, one.model_uri) == (other.model, other.quant, other.model_uri)
