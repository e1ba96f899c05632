"""Tenants through a gateway: each has its own cache and its own limits, as on one runtime."""

import asyncio
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from millrace.cli.certs import make_certs
from millrace.cli.connecting import fleet_client
from millrace.cli.failures import CommandFailed
from millrace.errors import MillraceError
from millrace.fleet_client import FleetClient
from millrace.runtime.v1 import runtime_pb2 as pb
from redis.asyncio import Redis

from runtime_service.gateway.fleet import Fleet
from runtime_service.gateway.runtime_link import MAX_IDLE_CALLS, LinkOptions
from shared.auth import TENANT_METADATA, ApiKeys
from shared.channels import PeerSecurity
from shared.errors import from_status
from shared.redis import connect
from shared.security import ServerSecurity
from shared.settings import SettingsError
from shared.tls import TlsFiles
from tests.integration.test_command import COMMAND, ENVIRON
from tests.runtime_service.daemon import (
    ENDLESS,
    ENDLESS_TOKENS,
    HANG_S,
    Call,
    start_of,
    until,
)
from tests.runtime_service.gateway.running_gateway import (
    RunningGateway,
    generation_id_of,
    kill,
    running_fleet,
    running_gateway,
)
from tests.runtime_service.test_tenants import PROMPT, shown
from tests.shared.key_files import new_key

NewKey = Callable[..., str]
# Not on this machine: an API key goes there over TLS alone.
FAR = "192.0.2.7:7602"


@pytest.fixture
def new(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> NewKey:
    """Makes a key of a tenant of the gateway."""
    return lambda tenant, *scopes, **limits: new_key(
        capsys, tmp_path / "keys", tenant, *scopes, **limits
    )


@asynccontextmanager
async def secured(
    folder: Path, capsys: pytest.CaptureFixture[str], *scopes: str, **options: Any
) -> AsyncIterator[RunningGateway]:
    """A gateway that asks for keys, and runtimes that ask the gateway for one with these scopes.

    Limits that the runtimes know are next to nothing, for none of them counts what a gateway did.
    """
    limits = {"concurrent": 1, "tokens_per_min": 1}
    new_key(capsys, folder / "peers", "acme", **limits)
    peer_key = new_key(capsys, folder / "peers", "gateway", *scopes, **limits)
    async with running_fleet(
        folder,
        security=ServerSecurity(api_keys=ApiKeys(folder / "peers")),
        gateway_security=ServerSecurity(api_keys=ApiKeys(folder / "keys")),
        peers=PeerSecurity(api_key=peer_key),
        **options,
    ) as fleet:
        yield fleet


def call_of(fleet: RunningGateway, key: str) -> Call:
    """A call of Generate by the owner of `key`."""
    return Call(fleet.stub.Generate(metadata=shown(key)))


async def cached_tokens(fleet: RunningGateway, key: str, first: int = 39) -> int:
    """How many tokens of a prompt that begins with `first` a cache gave to the owner of `key`."""
    call = call_of(fleet, key)
    await call.start("a", [first, *PROMPT], max_new_tokens=2)
    seen = (await call.finish())["a"]
    assert seen.finished is not None, f"it failed: {seen.error}"
    for daemon in fleet.daemons:
        await daemon.freed()
    return seen.finished.usage.cached_prompt_tokens


async def shares_within_tenants_alone(fleet: RunningGateway, keys: list[str]) -> None:
    """Asserts that a prompt is cached for the tenant that sent it, which has the first two keys."""
    acme, acme_too, globex = keys
    assert await cached_tokens(fleet, acme) == 0
    assert await cached_tokens(fleet, globex) == 0
    shared = await cached_tokens(fleet, acme_too)
    assert shared > 0
    assert await cached_tokens(fleet, globex) == shared


async def test_tenants_of_a_gateway_share_no_block_and_one_tenant_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], new: NewKey
) -> None:
    keys = [new("acme"), new("acme"), new("glöbex")]
    async with secured(tmp_path, capsys, "generate", "delegate", num_runtimes=1) as fleet:
        await shares_within_tenants_alone(fleet, keys)


async def test_a_generations_last_line_names_the_key_that_asked_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], new: NewKey
) -> None:
    """At the gateway and at its runtime, also where one call there carries those of several clients."""
    keys = [new("acme"), new("acme")]
    with structlog.testing.capture_logs([structlog.contextvars.merge_contextvars]) as logs:
        async with secured(tmp_path, capsys, "generate", "delegate", num_runtimes=1) as fleet:
            calls = [call_of(fleet, key) for key in keys]
            for number, call in enumerate(calls):
                await call.start(f"client {number}", PROMPT, max_new_tokens=2)
            for call in calls:
                await call.finish()
    told = [log for log in logs if log["event"] == "generation_finished"]
    at_gateway = {log["request_id"]: log for log in told if "prompt_tokens" not in log}
    for number, key in enumerate(keys):
        line = at_gateway[f"client {number}"]
        assert line["key"] == key.split("_")[1]
        assert (line["tenant"], line["rpc"]) == ("acme", "Generate")
    at_runtime = [log for log in told if "prompt_tokens" in log]
    assert [(log["rpc"], log["tenant"]) for log in at_runtime] == [("Generate", "acme")] * 2


async def test_tenants_share_no_block_on_runtimes_that_ask_nobody(
    tmp_path: Path, new: NewKey
) -> None:
    keys = [new("acme"), new("acme"), new("glöbex")]
    security = ServerSecurity(api_keys=ApiKeys(tmp_path / "keys"))
    async with running_fleet(tmp_path, 1, gateway_security=security) as fleet:
        await shares_within_tenants_alone(fleet, keys)


async def test_gateway_whose_key_may_not_delegate_is_refused_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], new: NewKey
) -> None:
    """At once, and for every tenant: none of them runs as the gateway itself."""
    keys = [new("acme"), new("globex")]
    async with secured(tmp_path, capsys, "generate", wait_s=600.0) as fleet:
        for key in keys:
            await fleet.usable(2)
            call = call_of(fleet, key)
            await call.start("a", PROMPT, max_new_tokens=2)
            seen = (await call.finish())["a"]
            assert not seen.token_ids
            error = from_status(seen.error)
            assert error.reason == "GATEWAY_REFUSED"
            assert "delegate" in str(error)
        assert all(not daemon.runtime.metrics.generated_tokens for daemon in fleet.daemons)


async def test_drained_call_of_an_idle_tenant_leaves_the_others_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], new: NewKey
) -> None:
    """A runtime that drains ends idle calls at once: what runs on the others' is finished there."""
    acme, globex = new("acme"), new("globex")
    async with secured(tmp_path, capsys, "generate", "delegate", num_runtimes=1) as fleet:
        assert await cached_tokens(fleet, globex) == 0
        call = call_of(fleet, acme)
        await call.start("a", PROMPT, max_new_tokens=20, credit_tokens=4)
        await call.read_until(lambda: call.num_tokens("a") == 4)
        (link,) = fleet.fleet
        draining = asyncio.create_task(fleet.daemons[0].runtime.drain(HANG_S))
        await until(lambda: list(link._calls) == ["acme"])
        await call.send(credit=pb.AddCredit(request_id="a", tokens=100))
        seen = (await call.finish())["a"]
        assert (seen.reason, call.num_tokens("a")) == ("LENGTH", 20)
        assert fleet.sample("moved_generations_total", reason="DRAINING") == 0
        await draining


async def test_calls_of_tenants_that_left_do_not_stay_open(tmp_path: Path) -> None:
    """Who is asked for no key may name any number of tenants; what runs is none the worse for it."""

    def call_for(fleet: RunningGateway, tenant: str) -> Call:
        return Call(fleet.stub.Generate(metadata=((TENANT_METADATA, tenant.encode()),)))

    async with running_fleet(tmp_path, num_runtimes=1) as fleet:
        calls = fleet.daemons[0].runtime._calls
        staying = call_for(fleet, "stays")
        await staying.start("a", PROMPT, max_new_tokens=20, credit_tokens=4)
        await staying.read_until(lambda: staying.num_tokens("a") == 4)
        for number in range(2 * MAX_IDLE_CALLS):
            call = call_for(fleet, f"tenant {number}")
            await call.start("a", PROMPT, max_new_tokens=2)
            assert (await call.finish())["a"].reason == "LENGTH"
        await until(lambda: len(calls) <= MAX_IDLE_CALLS)
        await staying.send(credit=pb.AddCredit(request_id="a", tokens=100))
        seen = (await staying.finish())["a"]
        assert (seen.reason, staying.num_tokens("a")) == ("LENGTH", 20)
        assert fleet.sample("moved_generations_total", reason="ENGINE_LOST") == 0


async def test_client_that_goes_on_needs_no_second_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], new: NewKey
) -> None:
    """That its call is lost the gateway may learn much later; what is resumed gives its place up then."""
    key = new("acme", concurrent=1)
    async with secured(tmp_path, capsys, "generate", "delegate") as fleet:
        lost = call_of(fleet, key)
        await lost.start("a", PROMPT, max_new_tokens=9, credit_tokens=4)
        await lost.read_until(lambda: lost.num_tokens("a") == 4)
        events = [event for message in lost.messages for event in message.events]
        name = next(e.started.generation_id for e in events if e.HasField("started"))
        call = call_of(fleet, key)
        resume = pb.ResumeGeneration(request_id="a", generation_id=name, received_tokens=[4])
        await call.send(resume=resume)
        seen = await call.read_to_end("a")
        assert seen.finished is not None, f"it was refused: {seen.error}"
        assert call.num_tokens("a") == 5
        for request_id in ("b", "c"):  # and an end frees the one place
            await call.start(request_id, PROMPT, max_new_tokens=2000, credit_tokens=2)
        await call.read_to_end("c")
        assert from_status(call.seen["c"].error).fields["limit"] == "concurrent"


async def test_generations_at_once_are_limited_over_the_whole_fleet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], new: NewKey
) -> None:
    """A place is free again after an end of any kind: cancelled, failed, or abandoned."""
    key, other = new("acme", concurrent=1), new("globex")
    async with secured(tmp_path, capsys, "generate", "delegate") as fleet:
        call = call_of(fleet, key)
        await call.start("a", PROMPT, max_new_tokens=2000, credit_tokens=4)
        await call.read_until(lambda: call.num_tokens("a") == 4)
        await call.start("b", PROMPT)
        error = from_status((await call.read_to_end("b")).error)
        assert (error.reason, error.fields["limit"]) == ("QUOTA_EXCEEDED", "concurrent")
        assert error.retry_after_s
        request = pb.GenerateStreamRequest(start=start_of(PROMPT))
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await fleet.stub.GenerateStream(request, metadata=shown(key)).read()
        assert failed.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        others = call_of(fleet, other)
        await others.start("a", PROMPT, max_new_tokens=2)
        assert (await others.finish())["a"].reason == "LENGTH"
        await call.send(cancel=pb.CancelGeneration(request_id="a"))
        await call.read_to_end("a")
        await call.start("c", PROMPT, model="nobody's")
        assert from_status((await call.read_to_end("c")).error).reason == "MODEL_NOT_SERVED"
        await call.start("d", PROMPT, max_new_tokens=2000, credit_tokens=4)
        await call.read_until(lambda: call.num_tokens("d") == 4)
        call.raw.cancel()
        await until(lambda: fleet.sample("running_generations") == 0)
        again = call_of(fleet, key)
        await again.start("a", PROMPT, max_new_tokens=2)
        assert (await again.finish())["a"].reason == "LENGTH"


async def test_tenant_that_floods_a_full_fleet_makes_others_wait_no_longer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], new: NewKey
) -> None:
    """Its own limit keeps it out: it is told so, and does not stand in the line of those that may run."""
    flooding, other = new("acme", concurrent=4), new("globex")
    options = {
        "num_runtimes": 1, "poll_s": HANG_S, "max_sequences": 4, "step_s": 0.01, **ENDLESS
    }  # fmt: skip
    options["max_waiting_tokens"] = len(PROMPT)
    async with secured(tmp_path, capsys, "generate", "delegate", **options) as fleet:
        flood, others = call_of(fleet, flooding), call_of(fleet, other)
        for number in range(4):
            await flood.start(str(number), PROMPT, max_new_tokens=ENDLESS_TOKENS)
            # One that waits fills the queue.
            await flood.read_until(lambda n=number: flood.num_tokens(str(n)) > 0)  # type: ignore[misc]
        await others.start("waiting", PROMPT, max_new_tokens=2)

        async def delay_s(name: str) -> float:
            await others.start(name, PROMPT[:1], max_new_tokens=2)
            error = from_status((await others.read_to_end(name)).error)
            assert error.reason == "QUEUE_FULL"
            return error.retry_after_s or 0.0

        before_s = await delay_s("before")
        for number in range(4, 504):
            await flood.start(str(number), PROMPT)
        await flood.read_until(lambda: sum(s.num_terminal for s in flood.seen.values()) == 500)
        errors = [from_status(one.error) for one in flood.seen.values() if one.error is not None]
        assert {(error.reason, error.fields.get("limit")) for error in errors} == {
            ("QUOTA_EXCEEDED", "concurrent")
        }
        assert abs(await delay_s("after") - before_s) < 0.15
        for call in (flood, others):
            call.raw.cancel()


async def test_tokens_are_counted_once_and_as_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], new: NewKey
) -> None:
    """What its generations used is gone from the minute, and nothing else."""
    key = new("acme", tokens_per_min=600)
    async with secured(tmp_path, capsys, "generate", "delegate") as fleet:
        call = call_of(fleet, key)
        await call.start("a", PROMPT, max_new_tokens=412, credit_tokens=5)
        await call.read_until(lambda: call.num_tokens("a") == 5)
        await call.start("b", PROMPT, max_new_tokens=400)
        error = from_status((await call.read_to_end("b")).error)
        assert (error.reason, error.fields["limit"]) == ("QUOTA_EXCEEDED", "tokens_per_min")
        assert error.retry_after_s
        await call.start("c", [40], max_new_tokens=2, model="nobody's")
        await call.read_to_end("c")
        await call.send(cancel=pb.CancelGeneration(request_id="a"))
        await call.read_to_end("a")  # used 105 of 600
        await call.start("d", PROMPT, max_new_tokens=390)
        assert (await call.finish())["d"].reason == "LENGTH"


async def test_what_is_resumed_counts_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], new: NewKey
) -> None:
    """The prompt and the tokens that the client has were counted where they were drawn."""
    key = new("acme", tokens_per_min=450)
    async with secured(tmp_path, capsys, "generate", "delegate") as fleet:
        call = call_of(fleet, key)
        await call.start("a", PROMPT, max_new_tokens=300, credit_tokens=200)
        await call.read_until(lambda: call.num_tokens("a") == 200)
        (started,) = [
            event.started
            for message in call.messages
            for event in message.events
            if event.HasField("started")
        ]
        call.raw.cancel()
        again = call_of(fleet, key)
        resume = pb.ResumeGeneration(
            request_id="a", generation_id=started.generation_id, received_tokens=[200]
        )
        await again.send(resume=resume)
        assert (await again.read_to_end("a")).reason == "LENGTH"
        await again.start("b", [40], max_new_tokens=40)  # used 400 of 450
        assert (await again.finish())["b"].reason == "LENGTH"


async def test_another_tenant_goes_on_with_nobodys_generation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], new: NewKey
) -> None:
    """Whoever got hold of its id: it is as unknown to him as any other, and goes on where it runs."""
    owner, owner_too, thief = new("acme"), new("acme"), new("globex")
    async with secured(tmp_path, capsys, "generate", "delegate") as fleet:
        call = call_of(fleet, owner)
        await call.start("a", PROMPT, max_new_tokens=60, credit_tokens=20)
        await call.read_until(lambda: call.num_tokens("a") == 20)
        known = generation_id_of(call)
        resume = pb.ResumeGeneration(request_id="a", generation_id=known, received_tokens=[20])
        unknown = pb.ResumeGeneration(request_id="b", generation_id="x" * len(known))
        stealing = call_of(fleet, thief)
        await stealing.send(resume=resume)
        await stealing.send(resume=unknown)
        refused = [from_status((await stealing.read_to_end(name)).error) for name in ("a", "b")]
        assert {error.reason for error in refused} == {"GENERATION_NOT_FOUND"}
        assert str(refused[0]).replace(known, "") == str(refused[1]).replace("x" * len(known), "")
        await call.send(credit=pb.AddCredit(request_id="a", tokens=10))
        await call.read_until(lambda: call.num_tokens("a") == 30)
        call.raw.cancel()
        again = call_of(fleet, owner_too)
        await again.send(resume=resume)
        assert (await again.read_to_end("a")).reason == "LENGTH"
        assert again.num_tokens("a") == 40


async def test_generations_that_say_no_length_reserve_what_an_engine_can_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], new: NewKey
) -> None:
    key = new("acme", tokens_per_min=100)
    async with secured(tmp_path, capsys, "generate", "delegate") as fleet:
        call = call_of(fleet, key)
        await call.start("a", [40, 41], credit_tokens=4)
        await call.read_until(lambda: call.num_tokens("a") == 4)
        await call.start("b", [40, 41], max_new_tokens=2)
        error = from_status((await call.read_to_end("b")).error)
        assert (error.reason, error.fields["limit"]) == ("QUOTA_EXCEEDED", "tokens_per_min")
        await call.send(cancel=pb.CancelGeneration(request_id="a"))
        await call.finish()


async def test_each_generation_keeps_its_tenant_where_it_moves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], new: NewKey
) -> None:
    """Both tenants' move to the runtime that is left, whose cache then knows each one's prompt."""
    keys = {tenant: new(tenant) for tenant in ("acme", "globex", "initech")}
    async with secured(
        tmp_path, capsys, "generate", "delegate", step_s=0.004, num_blocks=4096
    ) as fleet:
        calls = {tenant: call_of(fleet, keys[tenant]) for tenant in ("acme", "globex")}
        for call in calls.values():
            for number in range(10):
                prompt = [40 + number, *PROMPT]
                await call.start(str(number), prompt, max_new_tokens=200, credit_tokens=100)
        for call in calls.values():
            await call.read_until(
                lambda call=call: min(call.num_tokens(str(n)) for n in range(10)) > 5  # type: ignore[misc]
            )
        lost = fleet.busiest()
        await kill(lost)
        for call in calls.values():
            for number in range(10):
                await call.let_go_on(str(number))
            seen = await call.finish()
            assert {one.reason for one in seen.values()} == {"LENGTH"}
            for number in range(10):
                prompt = [40 + number, *PROMPT]
                assert seen[str(number)].token_ids[0] == (prompt * 2)[:200]
        assert fleet.sample("moved_generations_total", reason="ENGINE_LOST") > 0
        fleet.daemons.remove(lost)
        await fleet.daemons[0].freed()
        for number in range(40, 50):
            assert await cached_tokens(fleet, keys["initech"], number) == 0
            assert await cached_tokens(fleet, keys["acme"], number) > 0
            assert await cached_tokens(fleet, keys["globex"], number) > 0


@pytest.mark.redis
async def test_registered_runtime_that_the_key_may_not_be_sent_to_is_passed_over(
    tmp_path: Path, redis_url: str
) -> None:
    redis: Redis = connect(redis_url)
    peers = PeerSecurity(api_key="mr_a_b")
    await redis.hset("runtime:far", mapping={"address": FAR})
    with structlog.testing.capture_logs() as lines:
        async with running_gateway([], [], redis=redis, peers=peers) as gateway:
            for number in range(3):  # it looks again, and goes on
                near = f"127.0.0.1:{number + 1}"
                await redis.hset(f"runtime:{number}", mapping={"address": near})
                await until(lambda near=near: near in {link.address for link in gateway.fleet})  # type: ignore[misc]
            assert FAR not in {link.address for link in gateway.fleet}
    await redis.aclose()
    assert [one["runtime"] for one in lines if one["event"] == "runtime_passed_over"] == [FAR]


async def test_named_runtime_that_the_key_may_not_be_sent_to_is_an_error_at_start() -> None:
    options = LinkOptions(1.0, 1.0, 1 << 20, PeerSecurity(api_key="mr_a_b"))
    with pytest.raises(SettingsError, match="over TLS alone"):
        Fleet(None, (FAR,), options)


async def test_fleet_commands_show_a_key_over_tls(tmp_path: Path, new: NewKey) -> None:
    """The commands get as far as their key allows, and to the Redis that is not there."""
    make_certs(tmp_path, (), "client", 2)
    key = new("acme")
    admin = new("ops", "admin")
    tls = TlsFiles(tmp_path / "server.crt", tmp_path / "server.key")
    ca = str(tmp_path / "ca.crt")
    security = ServerSecurity(tls, ApiKeys(tmp_path / "keys"))
    async with running_gateway([], [], security=security) as gateway:
        address = gateway.server.address
        with FleetClient(address, api_key=key, tls_ca=ca) as client:
            found = await asyncio.to_thread(client.get_fleet)
            assert not found.runtimes
            with pytest.raises(MillraceError) as failed:
                await asyncio.to_thread(client.undeploy, "chat")
        assert failed.value.reason == "PERMISSION_DENIED"
        for arguments, shown_key, said in (
            (("status",), key, "knows no runtime"),
            (("status",), "", "API key"),
            (("deploy", "chat", "--model", "tiny"), key, "'admin'"),
            (("deploy", "chat", "--model", "tiny"), admin, "Redis"),
            (("undeploy", "chat"), admin, "Redis"),
        ):
            variables = {"MILLRACE_CLI_TLS_CA": ca, "MILLRACE_CLI_API_KEY": shown_key}
            done = await asyncio.to_thread(
                subprocess.run,
                [*COMMAND, *arguments, "--gateway", address],
                capture_output=True, text=True, timeout=60, env={**ENVIRON, **variables},
            )  # fmt: skip
            assert said in done.stderr, arguments


def test_fleet_commands_send_no_key_in_plaintext(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLRACE_CLI_API_KEY", "mr_a_b")
    with pytest.raises(CommandFailed, match="TLS"):
        fleet_client(FAR)


async def test_gateway_says_which_priority_a_tenant_may_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], new: NewKey
) -> None:
    """Its runtimes take its word for it: what they know of the tenant's limits, and of the gateway's own, is less."""
    key, ops = new("acme"), new("ops", max_priority=50)
    async with secured(tmp_path, capsys, "generate", "delegate", num_runtimes=1) as fleet:
        seen = {}
        for tenant, tenant_key in (("acme", key), ("ops", ops)):
            call = call_of(fleet, tenant_key)
            await call.start("a", PROMPT, max_new_tokens=2, priority=50)
            seen[tenant] = (await call.finish())["a"]
    assert from_status(seen["acme"].error).fields["field"] == "start.priority"
    assert seen["ops"].reason == "LENGTH"
