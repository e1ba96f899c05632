"""Runtimes serve what their deployment says, one after the other, and lose nothing on the way."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import structlog
from millrace.runtime.v1 import runtime_pb2 as pb
from redis.asyncio import Redis

from runtime_service.deployments import Deployment, Deployments, is_deployment_name
from runtime_service.engine_source import EngineSource
from runtime_service.reconciler import Reconciler
from shared.errors import DiskFull, MillraceError, QualityGate, from_status, reason_of
from shared.redis import connect
from tests.runtime_service.daemon import FP32, HANG_S, Daemon, publish_echo, running_daemon
from tests.runtime_service.test_engine_source import Builder, compile_daemon

pytestmark = pytest.mark.redis


@dataclass
class Member:
    """An idle runtime and what has it follow deployments."""

    daemon: Daemon
    reconciler: Reconciler

    @property
    def serves(self) -> str:
        """Model that it serves."""
        served = self.daemon.runtime.served
        return served.engine.model if served else ""

    async def settle(self) -> None:
        """Looks until it has loaded what it began to load."""
        await self.reconciler.look()
        attempt = self.reconciler._attempt
        if attempt is not None:
            await asyncio.wait({attempt.loading})
        if self.reconciler._unloading is not None:
            await self.reconciler._unloading
        await self.reconciler.look()


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    client = connect(redis_url)
    yield client
    await client.aclose()


@pytest.fixture
async def deployments(redis: Redis) -> Deployments:
    return Deployments(redis)


class Members:
    """Makes members that share nothing but Redis."""

    def __init__(self, folder: Path, deployments: Deployments, stack: AsyncExitStack) -> None:
        self._folder, self._deployments, self._stack = folder, deployments, stack
        self._num = 0

    async def new(self, name: str = "chat", unfit_s: float = HANG_S) -> Member:
        """A member of that deployment, or of any that lacks one."""
        self._num += 1
        running = running_daemon(self._folder / str(self._num), step_s=0.004)
        daemon = await self._stack.enter_async_context(running)
        publish_echo(daemon.store, "second")
        await daemon.runtime.unload()
        reconciler = Reconciler(
            daemon.runtime, self._deployments, f"runtime{self._num}", name, 0.02, HANG_S, unfit_s
        )
        return Member(daemon, reconciler)


@pytest.fixture
async def members(tmp_path: Path, deployments: Deployments) -> AsyncIterator[Members]:
    async with AsyncExitStack() as stack:
        yield Members(tmp_path, deployments, stack)


def chat(model: str = "echo", replicas: int = 2) -> Deployment:
    return Deployment("chat", model, FP32, "", replicas)


async def test_members_serve_and_a_spare_takes_the_place_of_one_that_leaves(
    members: Members, deployments: Deployments
) -> None:
    first, second = await members.new(), await members.new("")
    await first.settle()
    assert first.serves == "", "nothing is deployed yet"
    version = await deployments.apply(chat(replicas=1))
    await first.settle()
    await second.settle()
    assert (first.serves, second.serves) == ("echo", "")
    runtime = first.daemon.runtime
    assert (runtime.deployment, runtime.deployment_version) == ("chat", version)
    await first.reconciler.leave()
    await second.settle()
    assert second.serves == "echo"


async def test_versions_are_exchanged_one_at_a_time_and_what_runs_finishes(
    members: Members, deployments: Deployments
) -> None:
    first, second = await members.new(), await members.new()
    await deployments.apply(chat())
    await first.settle()
    await second.settle()
    call = first.daemon.call()
    await call.start("a", [40, 41], max_new_tokens=100, model="chat", credit_tokens=10)
    await call.read_until(lambda: call.num_tokens("a") > 2)
    await deployments.apply(chat("second"))
    await first.reconciler.look()
    await second.settle()
    assert second.serves == "echo", "the first one is being exchanged"
    await call.let_go_on("a")
    assert (await call.finish())["a"].reason == "LENGTH"
    await first.settle()
    assert (first.serves, second.serves) == ("second", "echo")
    await second.settle()
    assert second.serves == "second"


async def test_a_version_that_is_corrected_keeps_nobody_waiting(
    members: Members, deployments: Deployments
) -> None:
    """Neither for what it would have been exchanged after, nor, likewise, for its build."""
    member = await members.new()
    await deployments.apply(chat())
    await member.settle()
    served = member.daemon.runtime.served
    call = member.daemon.call()
    await call.start("a", [40, 41], max_new_tokens=100, model="chat", credit_tokens=10)
    await call.read_until(lambda: call.num_tokens("a") > 2)
    await deployments.apply(chat("second"))
    await member.reconciler.look()
    corrected = await deployments.apply(chat())
    await member.reconciler.look()
    attempt = member.reconciler._attempt
    assert attempt is not None
    assert attempt.loading.cancelling(), "it waits for what runs"
    await member.settle()  # the wrong version is given up
    await member.settle()
    assert member.daemon.runtime.deployment_version == corrected
    assert member.daemon.runtime.served is served
    await call.let_go_on("a")
    assert (await call.finish())["a"].reason == "LENGTH"


async def test_version_that_cannot_be_loaded_leaves_the_old_one_serving(
    members: Members, deployments: Deployments
) -> None:
    first, second = await members.new(), await members.new()
    await deployments.apply(chat())
    await first.settle()
    await second.settle()
    await deployments.apply(chat("nothing"))
    await first.settle()
    await second.settle()
    assert (first.serves, second.serves) == ("echo", "echo")
    await deployments.apply(chat("second"))
    await first.settle()
    assert first.serves == "second"


class _LostOnce(Deployments):
    """Redis that is away when a turn is to be given back, once."""

    is_lost = True

    async def end_roll(self, name: str, runtime_id: str) -> None:
        if self.is_lost:
            self.is_lost = False
            raise ConnectionError("a test has it so")
        await super().end_roll(name, runtime_id)


async def test_failed_load_is_told_where_redis_is_away_meanwhile(
    redis: Redis, tmp_path: Path
) -> None:
    """Else the same version would be tried again at every look, and nobody would know why."""
    deployments = _LostOnce(redis)
    async with AsyncExitStack() as stack:
        member = await Members(tmp_path, deployments, stack).new()
        await deployments.apply(chat("missing", replicas=1))
        with structlog.testing.capture_logs() as logs, pytest.raises(ConnectionError):
            await member.settle()
        assert "deployment_not_served" in {line["event"] for line in logs}
        await member.reconciler.look()
        assert member.reconciler._attempt is None, "it waits before it tries again"


async def test_member_loads_nothing_that_its_deployment_does_not_say(
    members: Members, deployments: Deployments
) -> None:
    """Else requests for the deployment would be answered by another model."""
    member = await members.new()
    request = pb.LoadEngineRequest()
    request.selector.model = "second"
    request.selector.quant.scheme = "fp32"
    await member.daemon.stub.LoadEngine(request)
    assert member.serves == "second", "nothing is deployed yet"
    await deployments.apply(chat(replicas=1))
    await member.settle()
    with pytest.raises(grpc.aio.AioRpcError, match=r"`millrace deploy chat \.\.\.`") as refused:
        await member.daemon.stub.LoadEngine(request)
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert member.serves == "echo"


async def test_unchanged_engine_is_not_loaded_again(
    members: Members, deployments: Deployments
) -> None:
    member = await members.new()
    await deployments.apply(chat())
    await member.settle()
    pid = member.daemon.client.pid
    version = await deployments.apply(chat())
    await member.settle()
    assert member.daemon.client.pid == pid
    assert member.daemon.runtime.deployment_version == version


async def test_undeployed_runtime_finishes_what_it_has_and_becomes_idle(
    members: Members, deployments: Deployments
) -> None:
    member = await members.new("")
    await deployments.apply(chat())
    await member.settle()
    call = member.daemon.call()
    await call.start("a", [40, 41], max_new_tokens=60, credit_tokens=10)
    await call.read_until(lambda: call.num_tokens("a") > 2)
    assert await deployments.delete("chat")
    assert not await deployments.delete("chat")
    assert await deployments.list() == []
    await member.reconciler.look()
    await call.let_go_on("a")
    assert (await call.finish())["a"].reason == "LENGTH"
    await member.settle()
    assert (member.serves, member.daemon.runtime.deployment) == ("", "")
    await deployments.apply(chat("second"))
    await member.settle()
    assert member.serves == "second"


async def test_redis_that_came_back_empty_stops_nobody(
    members: Members, deployments: Deployments, redis: Redis
) -> None:
    member = await members.new()
    await deployments.apply(chat())
    await member.settle()
    await redis.flushall()
    await member.settle()
    assert member.serves == "echo"


@pytest.mark.parametrize("name", ["chat", ""])
async def test_status_says_why_a_deployed_version_is_not_served_until_it_is(
    name: str, members: Members, deployments: Deployments
) -> None:
    """Of one that was started for it, and of an idle one, which leaves it to others."""
    member = await members.new(name)

    async def problem() -> pb.DeploymentProblem:
        await member.settle()
        status: pb.GetStatusResponse = await member.daemon.stub.GetStatus(pb.GetStatusRequest())
        return status.deployment_problem

    version = await deployments.apply(chat("nothing"))
    told = await problem()
    assert (told.deployment, told.version) == ("chat", version)
    assert reason_of(told.status) == "ENGINE_NOT_FOUND"
    assert "nothing" in told.status.message
    assert await problem() == told, "it stays so as long as it is wanted"
    await deployments.delete("chat")
    assert await problem() == pb.DeploymentProblem()
    await deployments.apply(chat("nothing"))
    assert (await problem()).version > version
    await deployments.apply(chat("second"))
    assert await problem() == pb.DeploymentProblem()
    assert member.serves == "second"


async def test_deployment_after_a_redis_that_came_back_empty_is_followed(
    members: Members, deployments: Deployments, redis: Redis
) -> None:
    """Its version is the first once more, as that of what is served."""
    member = await members.new()
    first = await deployments.apply(chat())
    await member.settle()
    await redis.flushall()
    assert await deployments.apply(chat("second")) == first
    await member.settle()
    assert member.serves == "second"


async def test_idle_runtime_gives_up_what_it_cannot_serve(
    members: Members, deployments: Deployments
) -> None:
    member = await members.new("")
    await deployments.apply(Deployment("broken", "nothing", FP32, "", 1))
    await member.settle()
    await deployments.apply(chat())
    await member.settle()
    await member.settle()
    assert member.serves == "echo"


async def test_idle_runtime_tries_again_what_it_could_not_serve(
    members: Members, deployments: Deployments
) -> None:
    """Its engine may have been pushed, or signed, since."""
    member = await members.new("", unfit_s=0.0)
    await deployments.apply(Deployment("late", "late", FP32, "", 1))
    await member.settle()
    assert member.serves == ""
    publish_echo(member.daemon.store, "late")
    member.reconciler._retry_at_s = 0.0  # time passes
    await member.settle()
    await member.settle()
    assert member.serves == "late"


@pytest.mark.parametrize("name", ["chat", ""])
@pytest.mark.parametrize(
    ("error", "num_builds"),
    [(QualityGate(problem="KL divergence 0.3 beyond 0.05"), 1), (DiskFull(path="/x"), 3)],
    ids=["for good", "for now"],
)
async def test_build_that_failed_for_good_is_not_asked_for_again_until_it_is_deployed_anew(
    error: MillraceError,
    num_builds: int,
    name: str,
    members: Members,
    deployments: Deployments,
) -> None:
    """What may pass is tried again; status tells which of them it is."""
    member = await members.new(name, unfit_s=60.0)
    builder, store = Builder(member.daemon.store, fails=error), member.daemon.store
    async with compile_daemon(builder, store) as address:
        source = EngineSource(store, None, address)
        member.daemon.runtime.keeper._starter._source = source
        missing = Deployment("chat", "missing", FP32, "some:uri", 1)
        version = await deployments.apply(missing)
        for _ in range(3):
            await member.settle()
            status = await member.daemon.stub.GetStatus(pb.GetStatusRequest())
            assert status.deployment_problem.version == version
            told = from_status(status.deployment_problem.status)
            assert told.reason == error.reason
            assert (told.retry_after_s is None) == (num_builds == 1)
            # Each wait that it told has passed.
            passed_s = told.retry_after_s or 1e6
            member.reconciler._retry_at_s -= passed_s
            member.reconciler._unfit = {
                unfit: until_s - passed_s for unfit, until_s in member.reconciler._unfit.items()
            }
        assert len(builder.requests) == num_builds
        await deployments.apply(missing)
        await member.settle()
        assert len(builder.requests) == num_builds + 1


async def test_waits_between_builds_of_a_version_grow_and_are_bounded(
    members: Members, deployments: Deployments, tmp_path: Path
) -> None:
    member = await members.new(unfit_s=60.0)
    store = member.daemon.store
    async with compile_daemon(Builder(store, fails=DiskFull(path="/x")), store) as address:
        member.daemon.runtime.keeper._starter._source = EngineSource(store, None, address)
        await deployments.apply(Deployment("chat", "missing", FP32, "some:uri", 1))
        waits_s = []
        for _ in range(8):
            await member.settle()
            problem = member.daemon.runtime.deployment_problem
            assert problem is not None
            waits_s.append(problem.error.retry_after_s)
            member.reconciler._retry_at_s = 0.0  # time passes
    assert waits_s == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]


@pytest.mark.parametrize(
    ("name", "is_valid"),
    [("chat", True), ("a", True), ("a-1", True), ("-a", False), ("A", False), ("a:b", False),
     ("", False), ("a" * 63, True), ("a" * 64, False), ("a\n", False)],
)  # fmt: skip
def test_deployments_have_names_that_are_safe_in_keys(name: str, is_valid: bool) -> None:
    assert is_deployment_name(name) == is_valid


async def test_unloading_that_failed_is_told_once_and_hinders_nothing(
    members: Members, deployments: Deployments
) -> None:
    member = await members.new()

    async def fail() -> None:
        raise RuntimeError("nobody thought of this")

    member.reconciler._unloading = asyncio.create_task(fail())
    await asyncio.wait({member.reconciler._unloading})
    with pytest.raises(RuntimeError):
        await member.reconciler.look()
    await deployments.apply(chat(replicas=1))
    await member.settle()
    assert member.serves == "echo"


async def test_member_that_was_told_to_unload_serves_again(
    members: Members, deployments: Deployments
) -> None:
    member = await members.new()
    await deployments.apply(chat(replicas=1))
    await member.settle()
    await member.daemon.runtime.unload()
    assert member.serves == ""
    await member.settle()
    assert member.serves == "echo"
