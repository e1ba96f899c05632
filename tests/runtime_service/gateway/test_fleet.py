"""The fleet as Redis introduces it, and as a gateway shows and directs it."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from millrace.fleet.v1 import fleet_pb2
from millrace.runtime.v1 import runtime_pb2 as pb
from redis.asyncio import Redis

from compiler_service.quantization import SCHEMES
from runtime_service.deployments import Deployments
from runtime_service.gateway.runtime_link import LinkOptions, RuntimeLink
from runtime_service.reconciler import Reconciler
from runtime_service.registration import Registration
from shared.channels import PeerSecurity
from shared.engine import SCHEME_ALIASES
from shared.errors import reason_of
from shared.redis import EmbeddedRedis, connect
from shared.security import ServerSecurity
from shared.tls import TlsFiles
from tests.integration.compiler_daemon import refusal
from tests.runtime_service.daemon import HANG_S, Daemon, publish_echo, running_daemon, until
from tests.runtime_service.gateway.running_gateway import (
    RunningGateway,
    running_fleet,
    running_gateway,
)
from tests.shared.certificates import made_in, server_files

pytestmark = pytest.mark.redis


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    client = connect(redis_url)
    yield client
    await client.aclose()


def registration(daemon: Daemon, redis_url: str) -> Registration:
    address = daemon.server.address
    return Registration(connect(redis_url), address, lambda: {"address": address}, 0.1)


async def test_log_says_once_that_redis_is_lost_and_that_it_is_back(
    embedded_redis: EmbeddedRedis, redis: Redis
) -> None:
    """Also where it was never there: a gateway may come up before it."""
    await asyncio.to_thread(embedded_redis.stop)
    with structlog.testing.capture_logs() as logs:

        def told() -> list[str]:
            return [log["event"] for log in logs if log["event"].startswith("redis_")]

        async with running_gateway([], [], redis=redis) as gateway:
            await until(lambda: told() == ["redis_lost"])
            await asyncio.to_thread(embedded_redis.start)
            await until(lambda: gateway.fleet.redis_answers)
            assert told() == ["redis_lost", "redis_found"]


async def test_gateway_meets_registered_runtimes_and_goes_on_without_redis(
    tmp_path: Path, embedded_redis: EmbeddedRedis, redis: Redis
) -> None:
    async with AsyncExitStack() as stack:
        daemons = [
            await stack.enter_async_context(running_daemon(tmp_path / str(n), step_s=0.004))
            for n in range(2)
        ]
        gateway = await stack.enter_async_context(running_gateway([], daemons, redis=redis))
        assert await refusal_of_start(gateway) == "NO_ENGINE"
        registrations = [registration(daemon, embedded_redis.url) for daemon in daemons]
        for one in registrations:
            one.start()
        await gateway.usable(2)
        await asyncio.to_thread(embedded_redis.kill)
        await until(lambda: not gateway.fleet.redis_answers)
        call = gateway.call()
        for number in range(20):
            await call.start(str(number), [40, number + 41], max_new_tokens=20)
        seen = await call.finish()
        assert {one.reason for one in seen.values()} == {"LENGTH"}
        await asyncio.to_thread(embedded_redis.start)
        await until(lambda: gateway.fleet.redis_answers)
        # One that is gone from Redis is known as long as it answers.
        await registrations[0].withdraw()
        await daemons[0].server.grpc.stop(0)
        await until(lambda: sum(1 for _ in gateway.fleet) == 1)
        await registrations[1].withdraw()


async def test_idle_runtime_is_not_waited_for(tmp_path: Path) -> None:
    """A start that names no model is refused at once, not after the time that a runtime may take to load."""
    async with running_fleet(tmp_path, num_runtimes=1) as fleet:
        await fleet.daemons[0].runtime.unload()
        await until(lambda: all(link.state == pb.RUNTIME_STATE_IDLE for link in fleet.fleet))
        async with asyncio.timeout(HANG_S):  # it would wait for twice as long
            assert await refusal_of_start(fleet) == "NO_ENGINE"


class OddOnce:
    """A client of Redis whose first look fails in a way that nobody thought of."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self.has_failed = False

    def __getattr__(self, name: str) -> Any:
        if name == "scan_iter" and not self.has_failed:
            self.has_failed = True
            raise RuntimeError("nobody thought of this")
        return getattr(self._redis, name)


async def test_gateway_goes_on_meeting_runtimes_after_a_look_that_failed(
    tmp_path: Path, redis: Redis, redis_url: str
) -> None:
    odd: Any = OddOnce(redis)
    async with running_daemon(tmp_path) as daemon:
        with structlog.testing.capture_logs() as logs:
            async with running_gateway([], [daemon], redis=odd) as gateway:
                one = registration(daemon, redis_url)
                one.start()
                await gateway.usable(1)
                await one.withdraw()
        failed = [log["task"] for log in logs if log["event"] == "background_failed"]
    assert (odd.has_failed, failed) == (True, ["follow_fleet"])


async def test_keys_of_others_hide_no_runtime_and_no_deployment(
    tmp_path: Path, redis: Redis, redis_url: str
) -> None:
    for kind in ("runtime", "deployment"):
        await redis.rpush(f"{kind}:list", "1")
        await redis.set(b"%s:\xff" % kind.encode(), "1")
        await redis.hset(f"{kind}:half", "other", "1")
    with structlog.testing.capture_logs() as logs:
        async with (
            running_daemon(tmp_path) as daemon,
            running_gateway([], [daemon], redis=redis) as gateway,
        ):
            one = registration(daemon, redis_url)
            one.start()
            await gateway.usable(1)
            await deploy(gateway, "echo")
            found = await gateway.fleet_stub.GetFleet(fleet_pb2.GetFleetRequest())
            await one.withdraw()
    assert [d.name for d in found.deployments] == ["chat"]
    assert sorted(log["key"] for log in logs if log["event"] == "redis_key_passed_over") == [
        "deployment:half", "deployment:list", "runtime:half", "runtime:list",
    ]  # fmt: skip


async def test_deployment_may_take_the_name_of_what_is_none(redis: Redis) -> None:
    await redis.rpush("deployment:chat", "1")
    async with running_gateway([], [], redis=redis) as gateway:
        delete = fleet_pb2.DeleteDeploymentRequest(name="chat")
        _, reason, _ = await refusal(gateway.fleet_stub.DeleteDeployment(delete))
        assert reason == "DEPLOYMENT_NOT_FOUND"
        assert (await deploy(gateway, "echo")).version == 1


async def test_gateway_goes_on_looking_at_a_runtime_after_a_look_that_failed(
    tmp_path: Path,
) -> None:
    async with running_fleet(tmp_path, 1) as gateway:
        (daemon,) = gateway.daemons
        has_failed = False

        def fail_once() -> None:
            nonlocal has_failed
            if not has_failed:
                has_failed = True
                raise RuntimeError("nobody thought of this")

        gateway.fleet.on_change(fail_once)
        with structlog.testing.capture_logs() as logs:
            await daemon.runtime.unload()
            await gateway.usable(0)
            await daemon.load()
            await gateway.usable(1)
        assert has_failed
        assert "watch_runtime" in [log.get("task") for log in logs]


async def refusal_of_start(gateway: RunningGateway) -> str:
    call = gateway.call()
    await call.start("a", [40])
    error = (await call.finish())["a"].error
    return reason_of(error)


async def test_new_version_rolls_without_a_lost_generation(tmp_path: Path, redis: Redis) -> None:
    """Streams come and go all the time, by the deployment's name, while both runtimes change."""
    async with running_fleet(tmp_path, step_s=0.002, redis=redis) as gateway:
        following = []
        for number, daemon in enumerate(gateway.daemons):
            publish_echo(daemon.store, "second")
            reconciler = Reconciler(
                daemon.runtime, Deployments(redis), str(number), "chat", 0.02, HANG_S
            )
            following.append(asyncio.create_task(reconciler.run()))
        await deploy(gateway, "echo")
        first = await ready(gateway)

        call = gateway.call()
        is_rolled = asyncio.Event()
        num_started = 0

        async def keep_starting() -> None:
            nonlocal num_started
            while not is_rolled.is_set():
                for _ in range(3):
                    await call.start(str(num_started), [40, 41], max_new_tokens=40, model="chat")
                    num_started += 1
                await asyncio.sleep(0.01)
                # On a busy machine more would come than is finished.
                await until(lambda: num_running() < 200)

        def num_running() -> int:
            return num_started - sum(one.num_terminal for one in call.seen.values())

        starting = asyncio.create_task(keep_starting())
        reading = asyncio.create_task(call.read_rest())
        await until(lambda: len(call.seen) > 20)
        await deploy(gateway, "second")
        second = await ready(gateway)
        is_rolled.set()
        await starting
        await call.done()
        seen = await reading
        for task in following:
            task.cancel()
        assert second.version == first.version + 1
        assert [d.runtime.served.engine.model for d in gateway.daemons if d.runtime.served] == [
            "second", "second",
        ]  # fmt: skip
        assert len(seen) == num_started
        assert {one.reason for one in seen.values()} == {"LENGTH"}
        assert all(one.token_ids[0] == [40, 41] * 20 for one in seen.values())


async def test_changed_ca_of_its_runtimes_counts_without_a_restart_of_the_gateway(
    tmp_path: Path,
) -> None:
    old, new = made_in(tmp_path / "old"), made_in(tmp_path / "new")
    peers = PeerSecurity(TlsFiles(ca=old / "ca.crt"))
    async with running_daemon(tmp_path, security=ServerSecurity(server_files(new))) as daemon:
        options = LinkOptions(0.05, HANG_S, 1 << 20, peers)
        link = RuntimeLink(daemon.server.address, options, lambda: None)
        await link._look()
        assert not link.answers
        (old / "ca.crt").write_bytes(b"half")
        await link._look()
        assert not link.answers
        shutil.copy(new / "ca.crt", old / "ca.crt")
        link.start()
        await until(lambda: link.is_usable)
        await link.close()


async def deploy(gateway: RunningGateway, model: str) -> fleet_pb2.Deployment:
    wanted = fleet_pb2.Deployment(name="chat", model=model, replicas=2)
    wanted.quant.scheme = "fp32"
    request = fleet_pb2.ApplyDeploymentRequest(deployment=wanted)
    applied: fleet_pb2.Deployment = (await gateway.fleet_stub.ApplyDeployment(request)).deployment
    return applied


async def ready(gateway: RunningGateway) -> fleet_pb2.Deployment:
    """The deployment, once all of its replicas are ready."""
    async with asyncio.timeout(HANG_S):
        while True:
            found = await gateway.fleet_stub.GetFleet(fleet_pb2.GetFleetRequest())
            for deployment in found.deployments:
                if deployment.ready_replicas == deployment.replicas:
                    return deployment  # type: ignore[no-any-return]
            await asyncio.sleep(0.02)


async def test_version_after_a_redis_that_came_back_empty_is_none_that_a_runtime_serves(
    tmp_path: Path, redis: Redis
) -> None:
    """Else it would count as ready before anybody has looked at it."""
    async with running_fleet(tmp_path, redis=redis) as gateway:
        for daemon in gateway.daemons:
            daemon.runtime.deployment, daemon.runtime.deployment_version = "chat", 7
        await until(lambda: {link.status.deployment_version for link in gateway.fleet} == {7})
        applied = await deploy(gateway, "second")
        assert (applied.version, applied.ready_replicas) == (8, 0)
        assert (await deploy(gateway, "second")).version == 9


async def test_fleet_is_shown_as_it_is(tmp_path: Path, redis: Redis) -> None:
    async with running_fleet(tmp_path, redis=redis) as gateway:
        call = gateway.call()
        await call.start("a", [40, 41], max_new_tokens=20, credit_tokens=10)
        await call.read_until(lambda: call.num_tokens("a") == 10)
        found = await gateway.fleet_stub.GetFleet(fleet_pb2.GetFleetRequest())
        assert [r.address for r in found.runtimes] == sorted(
            daemon.server.address for daemon in gateway.daemons
        )
        assert {r.state for r in found.runtimes} == {pb.RUNTIME_STATE_SERVING}
        assert {(r.model, r.arch, r.num_blocks) for r in found.runtimes} == {("echo", "cpu", 256)}
        assert sum(runtime.generations for runtime in found.runtimes) == 1
        assert {r.startup[0].name for r in found.runtimes} == {"find_engine"}
        await gateway.daemons[0].server.grpc.stop(0)
        await gateway.usable(1)
        found = await gateway.fleet_stub.GetFleet(fleet_pb2.GetFleetRequest())
        assert {r.state for r in found.runtimes} == {
            pb.RUNTIME_STATE_SERVING, pb.RUNTIME_STATE_UNSPECIFIED,
        }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"name": "Chat"}, "deployment.name"),
        ({"model": ""}, "deployment.model"),
        ({"quant": {}}, "deployment.quant.scheme"),
        ({"quant": {"scheme": "int4-gx"}}, "deployment.quant.scheme"),
        ({"quant": {"scheme": "int4", "group_size": -1}}, "quant.group_size"),
        ({"quant": {"scheme": "int8-g64"}}, "deployment.quant.scheme"),
        ({"quant": {"scheme": "a" * 65}}, "deployment.quant.scheme"),
        ({"quant": {"scheme": "int8", "kv_cache": "fp4"}}, "deployment.quant.kv_cache"),
        ({"quant": {"scheme": "int8", "keep": ["lm_head"]}}, "deployment.quant"),
        ({"quant": {"scheme": "int8", "max_kl": 0.1}}, "deployment.quant"),
        ({"replicas": 0}, "deployment.replicas"),
        ({"replicas": 1001}, "deployment.replicas"),
    ],
    ids=[
        "name",
        "model",
        "no quant",
        "quant",
        "group",
        "group in scheme",
        "long scheme",
        "KV cache",
        "recipe",
        "gate",
        "none",
        "many",
    ],
)
async def test_deployment_that_makes_no_sense_is_refused(
    tmp_path: Path, redis: Redis, fields: dict[str, object], field: str
) -> None:
    whole = {"name": "chat", "model": "echo", "quant": {"scheme": "fp32"}, "replicas": 1, **fields}
    async with running_gateway([], [], redis=redis) as gateway:
        request = fleet_pb2.ApplyDeploymentRequest(deployment=whole)
        _, reason, sentence = await refusal(gateway.fleet_stub.ApplyDeployment(request))
        assert (reason, sentence.partition(":")[0]) == ("INVALID_FIELD", field)
        delete = fleet_pb2.DeleteDeploymentRequest(name="chat")
        _, reason, _ = await refusal(gateway.fleet_stub.DeleteDeployment(delete))
        assert reason == "DEPLOYMENT_NOT_FOUND"


@pytest.mark.parametrize("scheme", [*SCHEMES, *SCHEME_ALIASES])
async def test_every_scheme_can_be_deployed(redis: Redis, scheme: str) -> None:
    quant = {"scheme": scheme, "group_size": 64, "kv_cache": "fp8"}
    wanted = {"name": "chat", "model": "echo", "quant": quant, "replicas": 1}
    async with running_gateway([], [], redis=redis) as gateway:
        request = fleet_pb2.ApplyDeploymentRequest(deployment=wanted)
        applied = (await gateway.fleet_stub.ApplyDeployment(request)).deployment
    assert applied.quant.scheme == SCHEME_ALIASES.get(scheme, scheme)
    assert (applied.quant.group_size, applied.quant.kv_cache) == (64, "fp8")


async def test_nothing_is_deployed_without_redis() -> None:
    async with running_gateway([], []) as gateway:
        whole = {"name": "chat", "model": "echo", "quant": {"scheme": "fp32"}, "replicas": 1}
        request = fleet_pb2.ApplyDeploymentRequest(deployment=whole)
        code, reason, sentence = await refusal(gateway.fleet_stub.ApplyDeployment(request))
    # Trying again changes nothing.
    assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_DEPLOYMENTS")
    assert "--redis-url" in sentence
