"""API keys at the edge: who is let in, to which rpc, and what nobody is told."""

import json
import logging
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st
from millrace.aio import AsyncClient
from millrace.cli.keys import list_keys, revoke_key
from millrace.errors import MillraceError
from millrace.retries import Retries
from millrace.runtime.v1 import runtime_pb2, runtime_pb2_grpc
from prometheus_client import CollectorRegistry

from shared.auth import RPC_SCOPES, TENANT_METADATA, ApiKeys, caller
from shared.channels import PeerSecurity
from shared.errors import MillraceError as DaemonError
from shared.errors import PermissionDenied, Unauthenticated
from shared.log import configure_logging
from shared.security import ServerSecurity
from shared.server import DaemonServer
from shared.settings import SettingsError
from shared.tls import TlsFiles
from tests.shared.key_files import new_key

PROTOS = Path(__file__).parents[2] / "protos"


class Clock:
    """Time as a test lets it pass."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class TenantServicer(runtime_pb2_grpc.RuntimeServiceServicer):
    """Answers with the tenant that calls."""

    async def GetStatus(self, request: runtime_pb2.GetStatusRequest, context: Any) -> Any:
        return runtime_pb2.GetStatusResponse(runtime_id=caller().tenant)

    async def UnloadEngine(self, request: runtime_pb2.UnloadEngineRequest, context: Any) -> Any:
        return runtime_pb2.UnloadEngineResponse()


@asynccontextmanager
async def serving(path: Path) -> AsyncIterator[str]:
    """The address of a server that wants keys of that file."""
    security = ServerSecurity(api_keys=ApiKeys(path))
    server = DaemonServer("127.0.0.1:0", 1 << 20, CollectorRegistry(), security)
    runtime_pb2_grpc.add_RuntimeServiceServicer_to_server(TenantServicer(), server.grpc)  # type: ignore[abstract]
    await server.start("millrace.runtime.v1.RuntimeService")
    try:
        yield server.address
    finally:
        await server.grpc.stop(0)


def client(address: str, key: str) -> AsyncClient:
    """A client that shows `key` and does not try again."""
    return AsyncClient(runtime=address, api_key=key, retries=Retries(max_attempts=1))


async def refused(address: str, key: str) -> MillraceError:
    """What GetStatus says to that key."""
    async with client(address, key) as asking:
        with pytest.raises(MillraceError) as failed:
            await asking.get_status()
    return failed.value


def shown(key: str) -> tuple[tuple[str, str], ...]:
    """Metadata that shows `key`."""
    return (("authorization", f"Bearer {key}"),)


def test_every_rpc_has_a_scope() -> None:
    """An rpc without a row asks for `admin`: it must not be found out by its users."""
    files = [
        import_module(str(path.relative_to(PROTOS))[: -len(".proto")].replace("/", ".") + "_pb2")
        for path in PROTOS.rglob("*.proto")
    ]
    methods = {
        f"/{service.full_name}/{method.name}"
        for file in files
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert methods == set(RPC_SCOPES)


async def test_call_is_made_by_the_tenant_of_its_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = new_key(capsys, tmp_path / "keys", "acme")
    second = new_key(capsys, tmp_path / "keys", "globex")
    async with serving(tmp_path / "keys") as address:
        for key, tenant in ((first, "acme"), (second, "globex"), (first, "acme")):
            async with client(address, key) as asking:
                assert (await asking.get_status()).runtime_id == tenant


async def test_daemons_call_each_other_with_a_key_and_not_over_a_network_in_plaintext(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fleet.key").write_text(new_key(capsys, tmp_path / "keys", "fleet") + "\n")
    peers = PeerSecurity.load(TlsFiles(), tmp_path / "fleet.key")
    async with serving(tmp_path / "keys") as address, peers.aio_channel(address) as channel:
        stub: Any = runtime_pb2_grpc.RuntimeServiceStub(channel)
        assert (await stub.GetStatus(runtime_pb2.GetStatusRequest())).runtime_id == "fleet"
    with pytest.raises(SettingsError, match="over TLS alone"):
        peers.channel("compiler.example.org:7601")
    PeerSecurity(api_key=peers.api_key, is_insecure=True).check("compiler.example.org:7601")
    assert peers.api_key not in repr(peers)


async def test_wrong_unknown_and_missing_keys_are_refused_in_the_same_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever tries keys learns nothing: not which ids exist, nor of whom."""
    key = new_key(capsys, tmp_path / "keys", "acme")
    async with serving(tmp_path / "keys") as address:
        tries = (key[:-1] + ("a" if key[-1] != "a" else "b"), "mr_000000000000_x", "mr_")
        answers = [await refused(address, wrong) for wrong in tries]
        assert {answer.reason for answer in answers} == {"UNAUTHENTICATED"}
        assert len({str(answer) for answer in answers}) == 1
        assert {answer.code for answer in answers} == {grpc.StatusCode.UNAUTHENTICATED}
        missing = await refused(address, "")
        assert (missing.reason, missing.retry_after_s) == ("UNAUTHENTICATED", None)
        assert all("acme" not in str(answer) for answer in (*answers, missing))


@pytest.mark.parametrize(
    "content", [b"", b" \n", b"mr_a_b\nmr_c_d\n", "mr_ä_b".encode(), b"\xff\xfe"]
)
def test_file_without_one_key_is_one_line_at_start(content: bytes, tmp_path: Path) -> None:
    """Else calls go without a key, or gRPC refuses each of them later."""
    (tmp_path / "fleet.key").write_bytes(content)
    with pytest.raises(SettingsError, match="holds no API key") as refused:
        PeerSecurity.load(TlsFiles(), tmp_path / "fleet.key")
    assert "\n" not in str(refused.value)


@given(
    shown_key=st.text(max_size=80), scheme=st.sampled_from(["Bearer ", "bearer mr_", "", "Basic "])
)
def test_whatever_is_shown_is_a_valid_key_or_unauthenticated(
    tmp_path_factory: pytest.TempPathFactory, shown_key: str, scheme: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "keys.json"
    path.write_text('{"keys": {}}')
    with pytest.raises(Unauthenticated):
        ApiKeys(path).authenticate((("authorization", scheme + shown_key),))


async def test_scope_is_asked_per_rpc(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys"
    generate, build = new_key(capsys, path, "a"), new_key(capsys, path, "b", "build")
    admin = new_key(capsys, path, "c", "admin")
    async with serving(path) as address:
        denied = await refused(address, build)
        assert (denied.reason, denied.code) == (
            "PERMISSION_DENIED", grpc.StatusCode.PERMISSION_DENIED,
        )  # fmt: skip
        assert denied.metadata == {"rpc": "GetStatus", "scope": "generate", "scopes": "build"}
        for key, may in ((generate, False), (build, False), (admin, True)):
            async with grpc.aio.insecure_channel(address) as channel:
                stub: Any = runtime_pb2_grpc.RuntimeServiceStub(channel)
                call = stub.UnloadEngine(runtime_pb2.UnloadEngineRequest(), metadata=shown(key))
                assert (await call.code() is grpc.StatusCode.OK) == may


async def test_health_is_open_and_reflection_needs_any_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = new_key(capsys, tmp_path / "keys", "acme", "build")
    async with (
        serving(tmp_path / "keys") as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        health: Any = health_pb2_grpc.HealthStub(channel)
        answer = await health.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="*")
        call = reflection.ServerReflectionInfo(iter([asked]))
        assert await call.code() is grpc.StatusCode.UNAUTHENTICATED
        call = reflection.ServerReflectionInfo(iter([asked]), metadata=shown(key))
        names = [s.name for s in (await call.read()).list_services_response.service]
        assert "millrace.runtime.v1.RuntimeService" in names


def test_revoked_key_is_refused_and_a_new_one_let_in_without_a_restart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock, path = Clock(), tmp_path / "keys"
    key = new_key(capsys, path, "acme")
    keys = ApiKeys(path, clock)
    assert keys.authenticate(shown(key)).tenant == "acme"
    other = new_key(capsys, path, "globex")
    # At once: who made it may use it in the same second.
    assert keys.authenticate(shown(other)).tenant == "globex"
    revoke_key(path, key, as_json=False)
    clock.now_s += 1.5
    with pytest.raises(Unauthenticated):
        keys.authenticate(shown(key))
    assert keys.authenticate(shown(other)).tenant == "globex"


def test_broken_key_file_stops_a_start_and_not_a_running_daemon(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock, path = Clock(), tmp_path / "keys"
    key = new_key(capsys, path, "acme")
    keys = ApiKeys(path, clock)
    for content in ('{"keys": {"a": {"sha256": "short"}}}', "not json", '{"keys": {}, "x": 1}'):
        path.write_text(content)
        clock.now_s += 1.5
        assert keys.authenticate(shown(key)).tenant == "acme"
        with pytest.raises(SettingsError, match="is not a key file"):
            ApiKeys(path)
    path.unlink()
    with pytest.raises(SettingsError, match="cannot read API keys"):
        ApiKeys(path)


def test_key_is_kept_as_a_hash_in_a_file_of_its_owner(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys"
    key = new_key(capsys, path, "acme", "generate", "build", tokens_per_min=60)
    secret = key.split("_", 2)[2]
    assert len(secret) >= 43
    assert secret not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    list_keys(path, as_json=True)
    listed = capsys.readouterr().out
    assert secret not in listed
    assert "sha256" not in listed
    assert json.loads(listed)["tenants"] == {"acme": {"tokens_per_min": 60}}


def test_only_a_gateways_key_speaks_for_other_tenants(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys"
    plain = new_key(capsys, path, "acme")
    gateway = new_key(capsys, path, "gateway", "generate", "delegate")
    keys = ApiKeys(path)
    with_tenant = ((TENANT_METADATA, "glöbex".encode()),)
    assert keys.authenticate((*shown(gateway), *with_tenant)).tenant == "glöbex"
    assert keys.authenticate(shown(gateway)).tenant == "gateway"
    with pytest.raises(PermissionDenied):
        keys.authenticate((*shown(plain), *with_tenant))


async def test_requests_beyond_the_tenants_rate_are_refused_until_the_time_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its keys share the limit; other tenants do not feel it."""
    path = tmp_path / "keys"
    first = new_key(capsys, path, "acme", requests_per_s=0.01)
    second, other = new_key(capsys, path, "acme"), new_key(capsys, path, "globex")
    async with serving(path) as address:
        async with client(address, first) as asking:
            await asking.get_status()
        error = await refused(address, second)
        assert (error.reason, error.code) == (
            "QUOTA_EXCEEDED", grpc.StatusCode.RESOURCE_EXHAUSTED,
        )  # fmt: skip
        assert error.metadata["limit"] == "requests_per_s"
        assert error.retry_after_s is not None
        assert 0 < error.retry_after_s <= 100
        async with client(address, other) as asking:
            assert (await asking.get_status()).runtime_id == "globex"


async def test_keys_never_reach_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = new_key(capsys, tmp_path / "keys", "acme")
    wrong = f"mr_{'0' * 12}_wrongsecret"
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    configure_logging("debug", "json", "test")
    try:
        async with serving(tmp_path / "keys") as address:
            async with client(address, key) as asking:
                await asking.get_status()
            await refused(address, wrong)
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        structlog.reset_defaults()
    logged = capsys.readouterr().err
    assert '"tenant": "acme"' in logged
    assert "UNAUTHENTICATED" in logged
    assert key.split("_", 2)[2] not in logged
    assert "wrongsecret" not in logged


def test_denials_name_no_other_tenant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys"
    new_key(capsys, path, "secret-customer", concurrent=1)
    key = new_key(capsys, path, "acme", "build", requests_per_s=0.01)
    principal = ApiKeys(path).authenticate(shown(key))
    principal.quota.count_request()
    for refuse in (
        lambda: principal.require("Generate", "generate"), principal.quota.count_request,
    ):  # fmt: skip
        with pytest.raises(DaemonError) as failed:
            refuse()
        assert "secret-customer" not in f"{failed.value} {failed.value.fields}"
