"""HTTP is as guarded as gRPC: certificates, keys and quotas, where it listens, and whose tenant a client is."""

import asyncio
import ssl
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from aiohttp import web
from millrace.runtime.v1 import runtime_pb2 as pb
from millrace.runtime.v1 import runtime_pb2_grpc
from openai import (
    AuthenticationError,
    BadRequestError,
    PermissionDeniedError,
    RateLimitError,
)
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from runtime_service.gateway.http.server import HttpServer, Route, open_stream
from shared.auth import ApiKeys
from shared.edge import EdgeInterceptor
from shared.security import ServerSecurity
from shared.settings import SettingsError
from shared.tls import TlsFiles
from tests.runtime_service.daemon import ENDLESS, ENDLESS_TOKENS
from tests.runtime_service.gateway.openai_client import TEXT, client_of, serving
from tests.runtime_service.gateway.running_gateway import RunningGateway, running_fleet
from tests.shared.certificates import made_in, server_files
from tests.shared.key_files import new_key

PROMPT = list(range(40, 80))


def trusting(folder: Path, with_cert: bool = False) -> ssl.SSLContext:
    """What a client knows that trusts the CA in `folder`, and shows its certificate."""
    context = ssl.create_default_context(cafile=folder / "ca.crt")
    if with_cert:
        context.load_cert_chain(folder / "client.crt", folder / "client.key")
    return context


async def models(fleet: RunningGateway, tls: ssl.SSLContext, scheme: str = "https") -> int:
    """The status that a new connection gets."""
    url = f"{scheme}://{fleet.http.address}/v1/models"
    async with aiohttp.ClientSession() as session, session.get(url, ssl=tls) as response:
        return response.status


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "192.0.2.7"])
def test_public_address_needs_tls_and_authentication(host: str) -> None:
    edge = EdgeInterceptor(CollectorRegistry())
    for security in (ServerSecurity(), ServerSecurity(TlsFiles(Path("x"), Path("y")))):
        with pytest.raises(SettingsError, match="--insecure"):
            HttpServer(f"{host}:0", 1 << 20, edge, (), security)
    HttpServer(f"{host}:0", 1 << 20, edge, (), ServerSecurity(is_insecure=True))


async def test_https_has_the_daemons_certificate_and_follows_its_files(tmp_path: Path) -> None:
    old, new = made_in(tmp_path / "old"), made_in(tmp_path / "new")
    used = made_in(tmp_path / "used")
    for name in ("server.crt", "server.key"):
        (used / name).write_bytes((old / name).read_bytes())
    security = ServerSecurity(server_files(used))
    async with running_fleet(tmp_path, 1, gateway_security=security) as fleet:
        assert await models(fleet, trusting(old)) == 200
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await models(fleet, trusting(new))
        with pytest.raises(aiohttp.ClientError):
            await models(fleet, trusting(old), "http")
        (used / "server.crt").write_bytes((new / "server.crt").read_bytes())
        assert await models(fleet, trusting(old)) == 200  # its key is not there yet
        (used / "server.key").write_bytes((new / "server.key").read_bytes())
        assert await models(fleet, trusting(new)) == 200
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await models(fleet, trusting(old))


async def test_client_certificate_is_asked_for_and_names_the_tenant_as_for_grpc(
    tmp_path: Path,
) -> None:
    """A prompt that came over HTTP is cached for the same client's gRPC, and for no other's."""
    ours = made_in(tmp_path / "ours")
    theirs = made_in(tmp_path / "theirs", "globex")
    both = tmp_path / "both.crt"
    both.write_bytes((ours / "ca.crt").read_bytes() + (theirs / "ca.crt").read_bytes())
    tls = TlsFiles(ours / "server.crt", ours / "server.key", both)
    async with running_fleet(tmp_path, 1, gateway_security=ServerSecurity(tls)) as fleet:
        with pytest.raises((aiohttp.ClientError, ssl.SSLError)):
            await models(fleet, trusting(ours))
        url = f"https://{fleet.http.address}/v1/completions"
        cached = []
        for context in (trusting(ours, True), trusting(ours, True), _as(theirs, ours)):
            async with (
                aiohttp.ClientSession() as session,
                session.post(url, json={"prompt": PROMPT, "max_tokens": 2}, ssl=context) as answer,
            ):
                usage = (await answer.json())["usage"]
                cached.append(usage["prompt_tokens_details"]["cached_tokens"])
            await fleet.daemons[0].freed()
        cached.append(await _cached_over_grpc(fleet, ours))
    assert cached[0] == cached[2] == 0
    assert cached[1] == cached[3] > 0


async def test_unforeseen_failure_tells_nothing_and_a_stream_that_has_one_breaks_off() -> None:
    registry = CollectorRegistry()

    async def fail(request: web.Request) -> web.StreamResponse:
        if "late" in request.query:
            await (await open_stream(request, "text/plain")).write(b"so far so good")
        raise RuntimeError("the secret of the house")

    server = HttpServer(
        "127.0.0.1:0", 1 << 20, EdgeInterceptor(registry), [Route("GET", "/", fail)]
    )
    await server.start()
    try:
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://{server.address}/") as early:
                assert early.status == 500
                assert "secret" not in await early.text()
            async with session.get(f"http://{server.address}/?late") as late:
                assert late.status == 200
                with pytest.raises(aiohttp.ClientPayloadError):
                    await late.read()
    finally:
        await server.stop()
    labels = {"rpc": "GET /", "code": "INTERNAL"}
    assert registry.get_sample_value("millrace_rpcs_total", labels) == 2


async def test_request_that_is_no_http_is_logged_in_a_line_without_its_key(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Anybody can send such; the library's own line would be a traceback that quotes it."""
    server = HttpServer("127.0.0.1:0", 1 << 20, EdgeInterceptor(CollectorRegistry()), ())
    await server.start()
    host, _, port = server.address.rpartition(":")
    try:
        with capture_logs() as logs:
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer mr_key\x01\r\n\r\n")
            assert b" 400 " in await reader.readline()
            writer.close()
    finally:
        await server.stop()
    told = [line for line in logs if line["event"] == "http_not_understood"]
    assert [(line["log_level"], line["problem"]) for line in told] == [("info", "BadHttpMessage")]
    assert "mr_key" not in caplog.text + str(logs)


def _as(client: Path, server: Path) -> ssl.SSLContext:
    """Shows one folder's client certificate, and trusts the other's CA."""
    context = trusting(server)
    context.load_cert_chain(client / "client.crt", client / "client.key")
    return context


async def _cached_over_grpc(fleet: RunningGateway, folder: Path) -> int:
    names = ("ca.crt", "client.key", "client.crt")
    credentials = grpc.ssl_channel_credentials(*((folder / name).read_bytes() for name in names))
    start = pb.StartGeneration(token_ids=pb.TokenIds(ids=PROMPT))
    start.stop.max_new_tokens = 2
    async with grpc.aio.secure_channel(fleet.server.address, credentials) as channel:
        stub: Any = runtime_pb2_grpc.RuntimeServiceStub(channel)
        async for message in stub.GenerateStream(pb.GenerateStreamRequest(start=start)):
            for event in message.events:
                if event.HasField("finished"):
                    return int(event.finished.usage.cached_prompt_tokens)
    raise AssertionError("it did not finish")


async def test_keys_scopes_and_quotas_have_their_statuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = tmp_path / "keys"
    good = new_key(capsys, keys, "acme", concurrent=1)
    poor = new_key(capsys, keys, "poor", tokens_per_min=6)
    builder = new_key(capsys, keys, "builder", "build")
    security = ServerSecurity(api_keys=ApiKeys(keys))
    ask: Any = {"model": "echo", "prompt": TEXT, "max_tokens": 8}
    options = {"gateway_security": security, "step_s": 0.01, **ENDLESS}
    async with running_fleet(tmp_path, 1, **options) as fleet:
        async with client_of(fleet, "mr_x_y") as client:
            with pytest.raises(AuthenticationError) as wrong:
                await client.models.list()
        assert wrong.value.code == "invalid_api_key"
        async with client_of(fleet, builder) as client:
            with pytest.raises(PermissionDeniedError, match="'generate'"):
                await client.completions.create(**ask)
        async with client_of(fleet, poor) as client:
            await client.completions.create(**ask)
            with pytest.raises(RateLimitError) as too_many:
                await client.completions.create(**ask)
            seconds = int(too_many.value.response.headers["retry-after"])
            # It has used more than a minute's, and asks for more than is left of the next ones.
            assert 60 < seconds <= 1200
        async with client_of(fleet, good) as client:
            with pytest.raises(BadRequestError, match="at most 0 for this tenant") as ahead:
                await client.completions.create(**ask, extra_body={"priority": 1})
            assert ahead.value.param == "priority"
            endless = {**ask, "max_tokens": ENDLESS_TOKENS, "stream": True}
            stream = await client.completions.create(**endless)
            with pytest.raises(RateLimitError) as busy:
                await client.completions.create(**ask)
            assert busy.value.code == "rate_limit_exceeded"
            await stream.close()


async def test_open_server_answers_no_page_of_another_name(tmp_path: Path) -> None:
    """A site whose name is made to lead to 127.0.0.1 would else read what this machine says."""
    async with serving(tmp_path, num_runtimes=1) as (fleet, _), aiohttp.ClientSession() as session:
        port = fleet.http.address.rpartition(":")[2]
        statuses = []
        good, bad = ("localhost", "127.0.0.1", "[::1]"), ("evil.example", "", "[", "a b")
        for host in (*good, *bad, "evil.example:80"):
            name = f"{host}:{port}" if host and ":80" not in host else host
            url = f"http://{fleet.http.address}/api/fleet"
            async with session.get(url, headers={"Host": name}) as response:
                statuses.append(response.status)
    assert statuses == [200] * 3 + [400] * 5
