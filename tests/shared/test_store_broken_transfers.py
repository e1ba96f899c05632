"""Pushes and pulls that break off, on a real S3 and a real OCI registry: they go on, and what is listed is whole."""

import random
import signal
import subprocess
import sys

import pytest

from shared.engine import EngineManifest, EngineSelector
from shared.errors import StoreUnreachable
from shared.store import LocalStore, pull
from shared.store.registry_store import RegistryStore
from shared.store.s3 import S3Registry
from tests.shared.engines import INT8, REPOSITORY, publish_engine, weight_bytes
from tests.shared.remote_stores import BUCKET, RecordingRegistry, opened
from tests.shared.store_servers import BreakingProxy, S3Server

BIG_BYTES = 3 << 20


def through(proxy: BreakingProxy, url: str, monkeypatch: pytest.MonkeyPatch) -> RegistryStore:
    """The store at `url`, by way of `proxy`; from now on for S3."""
    if url.startswith("s3:"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{proxy.address}")
        return opened(url)
    host = url.split("/")[2]
    return opened(url.replace(host, proxy.address))


def server_of(url: str, s3: S3Server) -> str:
    """The `host:port` behind `url`."""
    return s3.endpoint.removeprefix("http://") if url.startswith("s3:") else url.split("/")[2]


@pytest.mark.parametrize("num_writes", range(6))
def test_push_that_breaks_off_before_a_write_leaves_no_broken_engine(
    url: str, local: LocalStore, other: LocalStore, num_writes: int
) -> None:
    """Three blobs, manifest, two indexes: at every moment what is listed can be pulled."""

    class Broken(Exception):
        pass

    def stop(num_done: int) -> None:
        if num_done == num_writes:
            raise Broken

    engine = publish_engine(local)
    recording = RecordingRegistry(opened(url).registry, stop)
    with pytest.raises(Broken):
        RegistryStore(recording).push(local, engine)
    fresh, selector = opened(url), EngineSelector("tiny", "cpu", INT8)
    listed = fresh.list()
    assert [found.manifest for found in listed] == [engine.manifest] * (num_writes > 3)
    assert (fresh.find(selector) is not None) == (num_writes > 3)
    for found in listed:
        other.verify(pull(fresh, found, other))
    assert opened(url).push(local, engine) == engine
    assert opened(url).list() == (engine,)


@pytest.mark.parametrize("seed", range(3))
def test_upload_that_breaks_off_at_any_byte_is_done_again(
    remote: RegistryStore,
    url: str,
    s3: S3Server,
    local: LocalStore,
    other: LocalStore,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    engine = publish_engine(local, weights=weight_bytes(BIG_BYTES, seed))
    limits = [random.Random(seed).randrange(1, BIG_BYTES) for _ in range(2)]
    with BreakingProxy(server_of(url, s3), limits, breaks="requests") as proxy:
        through(proxy, url, monkeypatch).push(local, engine)
        assert proxy.num_breaks == len(limits)
    with monkeypatch.context() as direct:
        direct.setenv("AWS_ENDPOINT_URL", s3.endpoint)
        assert pull(opened(url), engine, other) == engine


def test_push_whose_server_is_lost_leaves_nothing_and_goes_on(
    url: str, s3: S3Server, local: LocalStore, other: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = publish_engine(local, weights=weight_bytes(BIG_BYTES))
    server = server_of(url, s3)
    limits = [BIG_BYTES // 2] * 100
    with BreakingProxy(server, limits, breaks="requests", ends=True) as proxy:
        with pytest.raises(StoreUnreachable):
            _impatient(through(proxy, url, monkeypatch)).push(local, engine)
        assert proxy.num_breaks
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    direct = opened(url)
    assert direct.list() == ()
    direct.push(local, engine)
    assert pull(direct, engine, other) == engine


def _impatient(store: RegistryStore) -> RegistryStore:
    if isinstance(store.registry, S3Registry):
        return RegistryStore(S3Registry(BUCKET, store.url.split("/", 3)[3], retry_timeout_s=1.0))
    return store


@pytest.mark.parametrize("seed", range(3))
def test_download_that_breaks_off_at_random_bytes_is_resumed(
    remote: RegistryStore,
    url: str,
    s3: S3Server,
    local: LocalStore,
    other: LocalStore,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    """What is here is kept: all breaks together cost little more than what was in flight."""
    engine = publish_engine(local, weights=weight_bytes(BIG_BYTES, seed))
    remote.push(local, engine)
    chance = random.Random(seed)
    limits = [chance.randrange(BIG_BYTES // 16, BIG_BYTES // 6) for _ in range(4)]
    with BreakingProxy(server_of(url, s3), limits) as proxy:
        source = through(proxy, url, monkeypatch)
        assert pull(source, engine, other) == engine
        assert proxy.num_breaks == len(limits)
        assert proxy.num_bytes["answers"] < 1.5 * BIG_BYTES
    other.verify(engine)


def test_download_whose_process_is_killed_is_resumed(
    remote: RegistryStore,
    url: str,
    s3: S3Server,
    local: LocalStore,
    other: LocalStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = publish_engine(local, weights=weight_bytes(BIG_BYTES))
    remote.push(local, engine)
    weights = engine.layer("weights/00000")
    partial = other.root / "partial" / weights.digest.removeprefix("sha256:")
    limits = [2 << 20] * 100
    with BreakingProxy(server_of(url, s3), limits, stands_still=True) as proxy:
        with monkeypatch.context() as detour:
            process = puller(through(proxy, url, detour).url, engine, other)
        assert proxy.reached.wait(60)
        while not partial.exists() or partial.stat().st_size < 1 << 20:
            assert process.poll() is None, "it ended by itself"
        process.send_signal(signal.SIGKILL)
        process.wait()
    num_bytes = partial.stat().st_size
    assert 0 < num_bytes < weights.size_bytes
    recording = RecordingRegistry(opened(url).registry)
    assert pull(RegistryStore(recording), engine, other) == engine
    assert [offset for digest, offset in recording.reads if digest == weights.digest] == [num_bytes]
    other.verify(engine)


def puller(url: str, engine: EngineManifest, into: LocalStore) -> "subprocess.Popen[bytes]":
    """A process that pulls the engine."""
    program = (
        "import sys; from shared.store import LocalStore, open_store, pull\n"
        "store = open_store(sys.argv[1])\n"
        "pull(store, store.get(sys.argv[2]), LocalStore(sys.argv[3]))"
    )
    command = [sys.executable, "-c", program, url, engine.name, str(into.root)]
    return subprocess.Popen(command, cwd=REPOSITORY)


def test_processes_that_pull_one_engine_fetch_its_blobs_once(
    remote: RegistryStore,
    url: str,
    s3: S3Server,
    local: LocalStore,
    other: LocalStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = publish_engine(local, weights=weight_bytes(BIG_BYTES))
    remote.push(local, engine)
    with BreakingProxy(server_of(url, s3)) as proxy:
        store = through(proxy, url, monkeypatch)
        processes = [puller(store.url, engine, other) for _ in range(3)]
        assert [process.wait(120) for process in processes] == [0, 0, 0]
        assert BIG_BYTES < proxy.num_bytes["answers"] < 1.2 * BIG_BYTES
    other.verify(engine)
