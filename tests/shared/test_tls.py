"""TLS of servers and channels: who is let in, and what is said where something is wrong."""

import asyncio
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc
import pytest
from millrace.aio import AsyncClient
from millrace.channels import Security
from millrace.errors import MillraceError
from millrace.retries import Retries
from millrace.runtime.v1 import runtime_pb2, runtime_pb2_grpc
from prometheus_client import CollectorRegistry

from runtime_service.relay.relays import Relays
from shared.auth import caller
from shared.channels import PeerSecurity
from shared.errors import CompilerUnreachable
from shared.security import ServerSecurity
from shared.server import DaemonServer, daemon_registry, start_metrics
from shared.settings import SettingsError, split_address
from shared.store.remote import GrpcStore
from shared.tls import TlsFiles
from tests.clients.command import COMMAND
from tests.shared.certificates import client_options, let_expire, made_in, server_files


class TenantServicer(runtime_pb2_grpc.RuntimeServiceServicer):
    """Answers with the tenant that calls."""

    async def GetStatus(self, request: runtime_pb2.GetStatusRequest, context: Any) -> Any:
        return runtime_pb2.GetStatusResponse(runtime_id=caller().tenant or "nobody")


@asynccontextmanager
async def serving(
    security: ServerSecurity, listen: str = "127.0.0.1:0", relays: int = 0
) -> AsyncIterator[str]:
    """The address of a server with that security."""
    entrance = Relays(relays, 1 << 20, security, "error") if relays else None
    server = DaemonServer(listen, 1 << 20, CollectorRegistry(), security, entrance)
    runtime_pb2_grpc.add_RuntimeServiceServicer_to_server(TenantServicer(), server.grpc)  # type: ignore[abstract]
    await server.start("millrace.runtime.v1.RuntimeService")
    try:
        yield server.address
    finally:
        await server.stop()


async def tenant(address: str, **options: str) -> str:
    """Whom the server sees."""
    retries = Retries(max_attempts=1)
    async with AsyncClient(runtime=address, timeout_s=60, retries=retries, **options) as client:
        return (await client.get_status()).runtime_id


async def refusal(address: str, **options: str) -> str:
    """What a client is told that does not get in."""
    with pytest.raises(MillraceError) as failed:
        await tenant(address, **options)
    assert (failed.value.reason, failed.value.code.name) == ("UNREACHABLE", "UNAVAILABLE")
    return str(failed.value)


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CA and its certificates."""
    return made_in(tmp_path_factory.mktemp("certs"), client="acme")


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another CA and its certificates."""
    return made_in(tmp_path_factory.mktemp("others"))


async def test_client_gets_in_with_the_servers_ca_alone(certs: Path, others: Path) -> None:
    async with serving(ServerSecurity(server_files(certs))) as address:
        assert await tenant(address, **client_options(certs)) == "nobody"
        assert "not signed by the given CA" in await refusal(address, **client_options(others))
        assert "it may ask for TLS" in await refusal(address)
        command = (*COMMAND, "status", "--gateway", address)
        told = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True)
        assert "takes the CA from MILLRACE_CLI_TLS_CA," in told.stderr


@pytest.mark.parametrize("relays", [0, 2])
async def test_mutual_tls_lets_in_certificates_of_its_ca_alone(
    certs: Path, others: Path, relays: int
) -> None:
    """Where certificates alone say who calls, their name is the tenant."""
    stranger = client_options(certs) | {
        "tls_cert": str(others / "client.crt"), "tls_key": str(others / "client.key"),
    }  # fmt: skip
    security = ServerSecurity(server_files(certs, with_ca=True))
    async with serving(security, relays=relays) as address:
        assert await tenant(address, **client_options(certs, with_cert=True)) == "acme"
        assert "client certificate of its CA" in await refusal(address, **client_options(certs))
        assert "client certificate of its CA" in await refusal(address, **stranger)


async def test_client_is_told_that_the_server_has_no_tls_or_another_name(certs: Path) -> None:
    async with serving(ServerSecurity()) as address:
        assert "does not speak TLS" in await refusal(address, **client_options(certs))
    async with serving(ServerSecurity(server_files(certs)), "127.0.0.2:0") as address:
        assert "for another host" in await refusal(address, **client_options(certs))


async def test_changed_certificates_count_at_the_next_handshake(
    certs: Path, others: Path, tmp_path: Path
) -> None:
    """A certificate that runs out while the daemon runs is told of at clients; a new one helps."""
    folder = Path(shutil.copytree(certs, tmp_path / "certs"))
    async with serving(ServerSecurity(server_files(folder))) as address:
        assert await tenant(address, **client_options(certs)) == "nobody"
        shutil.copy(others / "server.crt", folder / "server.crt")  # not yet its key
        assert await tenant(address, **client_options(certs)) == "nobody"
        shutil.copy(others / "server.key", folder / "server.key")
        assert await tenant(address, **client_options(others)) == "nobody"
        assert "not signed" in await refusal(address, **client_options(certs))


async def test_certificate_that_ran_out_under_a_running_server_is_told_of(tmp_path: Path) -> None:
    certs = made_in(tmp_path)
    let_expire(certs / "server.crt", certs)
    _, key, cert = server_files(certs).read()
    assert key is not None
    assert cert is not None
    server = grpc.aio.server()  # ours does not start with it
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, cert)]))
    await server.start()
    said = await refusal(f"127.0.0.1:{port}", **client_options(certs))
    assert "its certificate has expired" in said
    await server.stop(0)


def test_unusable_files_are_one_line_at_start(certs: Path, others: Path, tmp_path: Path) -> None:
    expired = made_in(tmp_path / "expired")
    let_expire(expired / "server.crt", expired)
    wrong = {
        "are no certificate and its key: key values mismatch": TlsFiles(
            certs / "server.crt", others / "server.key"
        ),
        "expired at": server_files(expired),
        "given both, or neither": TlsFiles(certs / "server.crt"),
        "No such file": TlsFiles(tmp_path / "none.crt", certs / "server.key"),
        "is no CA certificate": TlsFiles(
            certs / "server.crt", certs / "server.key", certs / "ca.key"
        ),
    }
    for problem, files in wrong.items():
        with pytest.raises(SettingsError, match=problem) as failed:
            files.check()
        assert "\n" not in str(failed.value)


def test_sdk_refuses_unusable_files_and_keys_in_plaintext(certs: Path, others: Path) -> None:
    with pytest.raises(ValueError, match="TLS cannot use"):
        Security(**client_options(certs) | {
            "tls_cert": str(certs / "client.crt"), "tls_key": str(others / "client.key")
        })  # fmt: skip
    with pytest.raises(ValueError, match="certificate and its key go together"):
        Security(tls_cert=str(certs / "client.crt"))
    with pytest.raises(ValueError, match="over TLS alone"):
        Security(api_key="mr_a_b").check("runtime.example.org:7602")
    assert "mr_a_b" not in repr(Security(api_key="mr_a_b"))


async def test_daemons_call_each_other_over_tls(certs: Path, others: Path) -> None:
    tls = TlsFiles(certs / "client.crt", certs / "client.key", certs / "ca.crt")
    async with serving(ServerSecurity(server_files(certs, with_ca=True))) as address:
        async with PeerSecurity(tls).aio_channel(address) as channel:
            stub: Any = runtime_pb2_grpc.RuntimeServiceStub(channel)
            assert (await stub.GetStatus(runtime_pb2.GetStatusRequest())).runtime_id == "acme"
        stranger = GrpcStore(address, PeerSecurity(TlsFiles(ca=others / "ca.crt")))
        with pytest.raises(CompilerUnreachable, match="CERTIFICATE_VERIFY_FAILED"):
            await asyncio.to_thread(stranger.get, "engines/abcdef")


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "runtime.example.org:7602"])
def test_public_address_needs_tls_and_authentication(listen: str, certs: Path) -> None:
    for security in (ServerSecurity(), ServerSecurity(server_files(certs))):
        with pytest.raises(SettingsError, match="--insecure"):
            DaemonServer(listen, 1 << 20, CollectorRegistry(), security)
    mutual = ServerSecurity(server_files(certs, with_ca=True))
    for security in (mutual, ServerSecurity(is_insecure=True)):
        security.check_listen(split_address(listen)[0])


def test_metrics_off_loopback_are_https(certs: Path) -> None:
    with pytest.raises(SettingsError, match="--insecure"):
        start_metrics("0.0.0.0:0", daemon_registry())
    plain = start_metrics("127.0.0.1:0", daemon_registry(), ServerSecurity(server_files(certs)))
    assert b"process_" in urlopen(f"http://{plain}/metrics", timeout=60).read()
    address = start_metrics("0.0.0.0:0", daemon_registry(), ServerSecurity(server_files(certs)))
    port = address.rpartition(":")[2]
    trusting = ssl.create_default_context(cafile=str(certs / "ca.crt"))
    url = f"https://127.0.0.1:{port}/metrics"
    assert b"process_" in urlopen(url, timeout=60, context=trusting).read()
