"""The embedded server answers, keeps what it is told to keep, and never outlives its starter."""

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared.errors import RedisUnreachable
from shared.redis import EmbeddedRedis, connect, connect_sync, public_url, reachable

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
        done, _ = await asyncio.wait({task}, timeout=5)
        assert done, "the cancellation was lost"
    await client.aclose()


async def test_absent_server_is_a_clear_error() -> None:
    url = "redis://user:secret@127.0.0.1:1/0"
    client = connect(url)
    with pytest.raises(RedisUnreachable, match=r"redis://127\.0\.0\.1:1/0 does not answer"):
        async with reachable(url):
            await client.get("a")
    await client.aclose()


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
    deadline = time.monotonic() + 10
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
