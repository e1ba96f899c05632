"""Tenants of one runtime: no prefix is shared between them, and each has its own limits."""

from pathlib import Path
from typing import Any

import grpc
import pytest
from millrace.runtime.v1 import runtime_pb2 as pb

from shared.auth import ApiKeys
from shared.errors import from_status, reason_of
from shared.security import ServerSecurity
from tests.runtime_service.daemon import Call, Daemon, running_daemon, start_of
from tests.shared.key_files import new_key

PROMPT = list(range(40, 140))


def shown(key: str) -> tuple[tuple[str, str], ...]:
    """Metadata that shows `key`."""
    return (("authorization", f"Bearer {key}"),)


def call_of(daemon: Daemon, key: str) -> Call:
    """A call of Generate by the owner of `key`."""
    return Call(daemon.stub.Generate(metadata=shown(key)))


async def cached_tokens(daemon: Daemon, key: str) -> int:
    """How many prompt tokens the cache gave to the owner of `key`."""
    call = call_of(daemon, key)
    await call.start("a", PROMPT, max_new_tokens=2)
    seen = (await call.finish())["a"]
    assert seen.finished is not None, f"it failed: {seen.error}"
    await daemon.freed()
    return seen.finished.usage.cached_prompt_tokens


@pytest.fixture(params=[0, 2])
def relays(request: pytest.FixtureRequest) -> int:
    """Processes in front of the daemon."""
    return int(request.param)


def security(path: Path) -> dict[str, Any]:
    """What has a daemon ask for keys of that file."""
    return {"security": ServerSecurity(api_keys=ApiKeys(path))}


async def test_two_tenants_share_no_block_and_one_tenant_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], relays: int
) -> None:
    """Whether a prompt is cached is how one tenant could learn what another one sends."""
    path = tmp_path / "keys"
    acme, acme_too = new_key(capsys, path, "acme"), new_key(capsys, path, "acme")
    globex = new_key(capsys, path, "globex")
    async with running_daemon(tmp_path, relays=relays, **security(path)) as daemon:
        assert await cached_tokens(daemon, acme) == 0
        assert await cached_tokens(daemon, globex) == 0
        shared = await cached_tokens(daemon, acme_too)
        assert shared > 0
        assert await cached_tokens(daemon, globex) == shared


async def test_generations_at_once_are_limited_per_tenant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], relays: int
) -> None:
    """One too many ends alone; its call and its siblings go on, and an end frees its place."""
    path = tmp_path / "keys"
    key, other = new_key(capsys, path, "acme", concurrent=1), new_key(capsys, path, "globex")
    async with running_daemon(tmp_path, relays=relays, **security(path)) as daemon:
        call = call_of(daemon, key)
        await call.start("a", PROMPT, max_new_tokens=2000, credit_tokens=4)
        await call.read_until(lambda: call.num_tokens("a") == 4)
        await call.start("b", PROMPT)
        refused = await call.read_to_end("b")
        assert reason_of(refused.error) == "QUOTA_EXCEEDED"
        error = from_status(refused.error)
        assert error.fields["limit"] == "concurrent"
        assert error.retry_after_s
        request = pb.GenerateStreamRequest(start=start_of(PROMPT))
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await daemon.stub.GenerateStream(request, metadata=shown(key)).read()
        assert failed.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        others = call_of(daemon, other)
        await others.start("a", PROMPT, max_new_tokens=2)
        assert (await others.finish())["a"].reason == "LENGTH"
        await call.send(cancel=pb.CancelGeneration(request_id="a"))
        await call.read_to_end("a")
        await call.start("c", PROMPT, max_new_tokens=2)
        assert (await call.finish())["c"].reason == "LENGTH"


async def test_tokens_are_counted_as_used_when_a_generation_has_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys"
    key = new_key(capsys, path, "acme", tokens_per_min=600)
    async with running_daemon(tmp_path, **security(path)) as daemon:
        call = call_of(daemon, key)
        await call.start("a", PROMPT, max_new_tokens=412, credit_tokens=5)
        await call.read_until(lambda: call.num_tokens("a") == 5)
        await call.start("b", PROMPT, max_new_tokens=400)
        refused = from_status((await call.read_to_end("b")).error)
        assert (refused.reason, refused.fields["limit"]) == ("QUOTA_EXCEEDED", "tokens_per_min")
        await call.send(cancel=pb.CancelGeneration(request_id="a"))
        await call.read_to_end("a")  # used 105 of 600
        await call.start("c", PROMPT, max_new_tokens=390)
        assert (await call.finish())["c"].reason == "LENGTH"


async def test_requests_count_per_start_and_not_per_call(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys"
    key = new_key(capsys, path, "acme", requests_per_s=0.01)
    async with running_daemon(tmp_path, **security(path)) as daemon:
        call = call_of(daemon, key)
        await call.start("a", PROMPT, max_new_tokens=1)
        await call.start("b", PROMPT, max_new_tokens=1)
        seen = await call.finish()
        assert seen["a"].reason == "LENGTH"
        assert from_status(seen["b"].error).fields["limit"] == "requests_per_s"


async def test_priority_is_what_the_tenant_may_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], relays: int
) -> None:
    """None may go before others unless its key's file says so: a start or an update that would ends alone."""
    path = tmp_path / "keys"
    key, ops = new_key(capsys, path, "acme"), new_key(capsys, path, "ops", max_priority=50)
    async with running_daemon(tmp_path, relays=relays, **security(path)) as daemon:
        call = call_of(daemon, key)
        await call.start("high", PROMPT, priority=1)
        error = from_status((await call.read_to_end("high")).error)
        assert (error.reason, error.fields["field"]) == ("INVALID_FIELD", "start.priority")
        assert "must be at most 0 for this tenant, found 1" in str(error)
        await call.start("a", PROMPT, max_new_tokens=4, credit_tokens=2, priority=-5)
        await call.send(update=pb.UpdateGeneration(request_id="a", priority=0))
        await call.read_until(lambda: call.num_tokens("a") == 2)
        await call.send(update=pb.UpdateGeneration(request_id="a", priority=1))
        error = from_status((await call.read_to_end("a")).error)
        assert (error.reason, error.fields["field"]) == ("INVALID_FIELD", "update.priority")
        allowed = call_of(daemon, ops)
        await allowed.start("a", PROMPT, max_new_tokens=2, priority=50)
        await allowed.start("b", PROMPT, max_new_tokens=2, priority=51)
        seen = await allowed.finish()
        assert seen["a"].reason == "LENGTH"
        assert from_status(seen["b"].error).fields["field"] == "start.priority"
