"""Runtimes find engines and pull them through a compile daemon's ArtifactService."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import grpc
import pytest
from millrace.artifact.v1 import artifact_pb2, artifact_pb2_grpc
from millrace.compiler.v1 import compiler_pb2, compiler_pb2_grpc
from prometheus_client import CollectorRegistry

from compiler_service.artifact_service import ArtifactService
from shared import wire
from shared.engine import EngineManifest, EngineSelector
from shared.errors import (
    BlobNotFound,
    CompilerUnreachable,
    DigestMismatch,
    EngineNotFound,
    InvalidField,
)
from shared.server import DaemonServer
from shared.store import LocalStore, open_store, pull
from shared.store.remote import GrpcStore
from tests.shared.engines import INT8, corrupt, engine_key, publish_engine, weight_bytes

BIG_BYTES = 5 << 20
# With a daemon that hangs; one that is well brings a piece in some hundredths, and on a busy machine in some tenths.
PATIENCE_S = 2.0


class ListingServicer(compiler_pb2_grpc.CompilerServiceServicer):
    """Lists the store's engines, two a page."""

    def __init__(self, store: LocalStore) -> None:
        self._store = store

    async def ListEngines(
        self, request: compiler_pb2.ListEnginesRequest, context: object
    ) -> compiler_pb2.ListEnginesResponse:
        start = int(request.page_token or 0)
        engines = self._store.list()
        return compiler_pb2.ListEnginesResponse(
            engines=[wire.engine_to_proto(engine) for engine in engines[start : start + 2]],
            next_page_token=str(start + 2) if start + 2 < len(engines) else "",
        )


class RunningServer:
    """A real server on a free port, in a thread of its own."""

    def __init__(self, store: LocalStore) -> None:
        self._stop = asyncio.Event()
        address: Future[str] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(store, address)))
        self._thread.start()
        self.address = address.result()

    async def _serve(self, store: LocalStore, address: "Future[str]") -> None:
        self._loop = asyncio.get_running_loop()
        server = DaemonServer("127.0.0.1:0", 4 << 20, CollectorRegistry())
        artifact_pb2_grpc.add_ArtifactServiceServicer_to_server(ArtifactService(store), server.grpc)
        lister = ListingServicer(store)  # type: ignore[abstract]
        compiler_pb2_grpc.add_CompilerServiceServicer_to_server(lister, server.grpc)
        await server.start("millrace.artifact.v1.ArtifactService")
        address.set_result(server.address)
        await self._stop.wait()
        await server.grpc.stop(None)

    def stop(self) -> None:
        """Ends at once what runs; may be called twice."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()


class RecordingStore:
    """An ArtifactStore that tells which blobs were read from where."""

    def __init__(self, store: GrpcStore) -> None:
        self._store = store
        self.reads: list[tuple[str, int]] = []
        self.find, self.get, self.list = store.find, store.get, store.list

    def read(self, digest: str, offset: int = 0) -> Iterator[bytes]:
        self.reads.append((digest, offset))
        return self._store.read(digest, offset)


@pytest.fixture
def served(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "served")


@pytest.fixture
def local(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "local")


@pytest.fixture
def server(served: LocalStore) -> Iterator[RunningServer]:
    server = RunningServer(served)
    yield server
    server.stop()


@pytest.fixture
def remote(server: RunningServer) -> Iterator[GrpcStore]:
    store = open_store(f"grpc://{server.address}")
    assert isinstance(store, GrpcStore)
    yield store
    store.close()


@pytest.fixture
def engine(served: LocalStore) -> EngineManifest:
    return publish_engine(served, weights=weight_bytes(BIG_BYTES))


def test_remote_store_answers_as_the_local_one(served: LocalStore, remote: GrpcStore) -> None:
    engines = [
        publish_engine(served, engine_key(builder=str(i)), format_version=i) for i in range(1, 6)
    ]
    newest = engines[-1]
    selector = EngineSelector("tiny", "cpu", INT8)
    assert remote.list() == tuple(reversed(engines))
    assert remote.find(selector) == newest
    assert remote.find(selector, max_format=2) == engines[1]
    assert remote.find(EngineSelector(newest.key.model_digest, "cpu", INT8)) == newest
    assert remote.find(EngineSelector("other", "cpu", INT8)) is None
    for name in (newest.name, newest.key.digest, newest.key.digest[:16]):
        assert remote.get(name) == newest
    with pytest.raises(EngineNotFound):
        remote.get("engines/" + "0" * 64)


def test_blob_is_read_from_an_offset(remote: GrpcStore, engine: EngineManifest) -> None:
    content, digest = weight_bytes(BIG_BYTES), engine.layers[1].digest
    for offset in (0, 1, (1 << 20) + 7, BIG_BYTES - 1, BIG_BYTES):
        chunks = list(remote.read(digest, offset))
        assert b"".join(chunks) == content[offset:]
        assert all(len(chunk) <= 1 << 20 for chunk in chunks)


def test_bad_reads_are_refused_with_their_reason(remote: GrpcStore, engine: EngineManifest) -> None:
    digest = engine.layers[1].digest
    with pytest.raises(InvalidField, match="offset_bytes"):
        list(remote.read(digest, BIG_BYTES + 1))
    with pytest.raises(InvalidField, match="offset_bytes"):
        list(remote.read(digest, -1))
    with pytest.raises(InvalidField, match="digest"):
        list(remote.read("sha256:../../../etc/passwd"))
    with pytest.raises(BlobNotFound):
        list(remote.read("sha256:" + "0" * 64))
    with pytest.raises(InvalidField, match=r"selector\.model"):
        remote.find(EngineSelector("", "cpu", INT8))


def test_request_without_a_target_is_refused(server: RunningServer) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub = artifact_pb2_grpc.ArtifactServiceStub(channel)
        with pytest.raises(grpc.RpcError, match="target"):
            stub.FindEngine(artifact_pb2.FindEngineRequest())


def test_pulled_engine_is_the_same(
    remote: GrpcStore, served: LocalStore, local: LocalStore, engine: EngineManifest
) -> None:
    reports: list[tuple[int, int]] = []
    found = remote.get(engine.name)
    pulled = pull(remote, found, local, lambda done, total: reports.append((done, total)))
    assert pulled == engine == local.get(engine.name)
    local.verify(pulled)
    for blob in served.blobs_of(engine):
        assert local.read_all(blob.digest) == served.read_all(blob.digest)
    assert local.find(EngineSelector("tiny", "cpu", INT8)) == engine
    total = engine.manifest.size_bytes + sum(blob.size_bytes for blob in engine.layers)
    assert reports[-1] == (total, total)
    assert reports == sorted(reports)
    assert not list((local.root / "partial").iterdir())
    assert not list((local.root / "pins").iterdir())
    assert not [path.name for path in (local.root / "locks").iterdir() if len(path.name) == 64]


def test_second_pull_reads_nothing(
    remote: GrpcStore, local: LocalStore, engine: EngineManifest
) -> None:
    pull(remote, engine, local)
    recording = RecordingStore(remote)
    assert pull(recording, engine, local) == engine
    assert recording.reads == []


def test_broken_pull_is_resumed_where_it_stopped(
    server: RunningServer, served: LocalStore, local: LocalStore
) -> None:
    """Law 7: a compile daemon that dies in the middle of a pull costs what was under way."""
    # More than the connection buffers, so that the server cannot have sent all of it.
    engine = publish_engine(served, weights=weight_bytes(24 << 20))
    weights = engine.layer("weights/00000")

    def stop_after_a_while(done: int, total: int) -> None:
        if done > total // 8:
            server.stop()

    with pytest.raises(CompilerUnreachable):
        pull(GrpcStore(server.address), engine, local, stop_after_a_while)
    with pytest.raises(EngineNotFound):
        local.get(engine.name)
    partial = local.root / "partial" / weights.digest.removeprefix("sha256:")
    num_bytes = partial.stat().st_size
    assert 0 < num_bytes < weights.size_bytes

    restarted = RunningServer(served)
    try:
        recording = RecordingStore(GrpcStore(restarted.address))
        assert pull(recording, engine, local) == engine
    finally:
        restarted.stop()
    assert (weights.digest, num_bytes) in recording.reads
    assert (weights.digest, 0) not in recording.reads
    local.verify(engine)


class HangingStore:
    """Sends one piece of a blob and then hangs, each time that it is read; `release` ends that.

    Its server's connection is well all the while, and answers every ping.
    """

    def __init__(self, store: LocalStore) -> None:
        self._store = store
        self._released = threading.Event()
        self.find, self.get, self.list = store.find, store.get, store.list
        self.release = self._released.set

    def read(self, digest: str, offset: int = 0) -> Iterator[bytes]:
        chunks = self._store.read(digest, offset)
        yield from islice(chunks, 1)
        for chunk in chunks:
            self._released.wait(60.0)
            yield chunk


def test_read_goes_on_at_a_daemon_that_hangs_after_every_piece(
    served: LocalStore, engine: EngineManifest
) -> None:
    hanging: Any = HangingStore(served)
    server = RunningServer(hanging)
    source = GrpcStore(server.address, timeout_s=PATIENCE_S)
    try:
        chunks = list(source.read(engine.layers[1].digest))
    finally:
        hanging.release()
        server.stop()
    assert b"".join(chunks) == weight_bytes(BIG_BYTES)


def test_pull_from_a_daemon_that_hangs_is_given_up_and_resumed_elsewhere(
    served: LocalStore, local: LocalStore, engine: EngineManifest
) -> None:
    """Only what is under way is lost; nothing waits for ever for a daemon that is alive and does nothing."""

    class DeadStore(HangingStore):
        def read(self, digest: str, offset: int = 0) -> Iterator[bytes]:
            if digest != engine.layers[1].digest:
                yield from self._store.read(digest, offset)
            elif not offset:
                yield from super().read(digest)
            self._released.wait(60.0 if offset else 0.0)

    hanging: Any = DeadStore(served)
    server = RunningServer(hanging)
    try:
        with pytest.raises(CompilerUnreachable, match="DEADLINE_EXCEEDED"):
            pull(GrpcStore(server.address, timeout_s=PATIENCE_S), engine, local)
    finally:
        hanging.release()
        server.stop()
    partial = local.root / "partial" / engine.layers[1].digest.removeprefix("sha256:")
    assert partial.stat().st_size == 1 << 20
    well = RunningServer(served)
    try:
        recording = RecordingStore(GrpcStore(well.address))
        assert pull(recording, engine, local) == engine
    finally:
        well.stop()
    assert (engine.layers[1].digest, 1 << 20) in recording.reads


def test_corrupt_partial_download_starts_again(
    remote: GrpcStore, local: LocalStore, engine: EngineManifest
) -> None:
    weights = engine.layer("weights/00000")
    partial = local.root / "partial" / weights.digest.removeprefix("sha256:")
    for left_over in (b"other bytes", weight_bytes(BIG_BYTES) + b"more", b"\0" * BIG_BYTES):
        partial.write_bytes(left_over)
        recording = RecordingStore(remote)
        assert pull(recording, engine, local) == engine
        assert (weights.digest, 0) in recording.reads
        local.verify(engine)
        local.blob_path(weights.digest).unlink()


def test_corrupt_blob_in_the_served_store_is_refused(
    remote: GrpcStore, served: LocalStore, local: LocalStore, engine: EngineManifest
) -> None:
    """Law 7: never served."""
    corrupt(served, engine.layers[1])
    with pytest.raises(DigestMismatch):
        pull(remote, engine, local)
    with pytest.raises(EngineNotFound):
        local.get(engine.name)
    # From now on the engine is as good as absent, so that it is built again.
    assert remote.find(EngineSelector("tiny", "cpu", INT8)) is None


def test_corrupt_local_blob_is_fetched_again(
    remote: GrpcStore, local: LocalStore, engine: EngineManifest
) -> None:
    pull(remote, engine, local)
    corrupt(local, engine.layers[1])
    recording = RecordingStore(remote)
    assert pull(recording, engine, local) == engine
    assert recording.reads == [(engine.layers[1].digest, 0)]
    local.verify(engine)


def test_lying_source_is_caught(
    remote: GrpcStore, served: LocalStore, local: LocalStore, engine: EngineManifest
) -> None:
    """The puller trusts nobody: a server's own check can miss what its disk does."""

    class LyingStore(RecordingStore):
        def read(self, digest: str, offset: int = 0) -> Iterator[bytes]:
            for chunk in super().read(digest, offset):
                yield chunk if digest != engine.layers[1].digest else b"\0" * len(chunk)

    with pytest.raises(DigestMismatch):
        pull(LyingStore(remote), engine, local)
    assert not (
        local.root / "blobs/sha256" / engine.layers[1].digest.removeprefix("sha256:")
    ).exists()
    assert pull(remote, engine, local) == engine


def test_source_that_never_ends_is_cut_off(
    remote: GrpcStore, local: LocalStore, engine: EngineManifest
) -> None:
    class EndlessStore(RecordingStore):
        def read(self, digest: str, offset: int = 0) -> Iterator[bytes]:
            while True:
                yield b"\0" * 1000

    with pytest.raises(DigestMismatch):
        pull(EndlessStore(remote), engine, local)


def test_other_engine_under_the_asked_name_is_refused(
    served: LocalStore, local: LocalStore, engine: EngineManifest
) -> None:
    other = publish_engine(served, engine_key("sm_90"))
    mislabelled = EngineManifest(
        engine.key, "tiny", 1, other.layers, other.manifest, engine.created_s
    )
    with pytest.raises(DigestMismatch):
        pull(served, mislabelled, local)
    assert local.list() == ()


def test_concurrent_pulls_fetch_each_blob_once(
    server: RunningServer, local: LocalStore, engine: EngineManifest
) -> None:
    sources = [RecordingStore(GrpcStore(server.address)) for _ in range(4)]
    stores = [LocalStore(local.root) for _ in sources]
    with ThreadPoolExecutor(len(sources)) as pool:
        pulled = list(pool.map(pull, sources, [engine] * len(sources), stores))
    assert pulled == [engine] * 4
    reads = [digest for source in sources for digest, _ in source.reads]
    assert len(reads) == len(set(reads)) == 4  # manifest, configuration, graph, weights


def test_pull_leaves_no_engine_when_swept_meanwhile(
    remote: GrpcStore, local: LocalStore, engine: EngineManifest
) -> None:
    """A sweep in the middle of a pull takes nothing that the pull needs."""
    sweeper = LocalStore(local.root)
    assert pull(remote, engine, local, lambda done, total: (sweeper.sweep(0), None)[1]) == engine
    local.verify(engine)


def test_unreachable_daemon_is_an_error_that_names_it() -> None:
    store = GrpcStore("127.0.0.1:1")
    for call in (store.list, lambda: store.get("0" * 64), lambda: list(store.read("x"))):
        with pytest.raises(CompilerUnreachable, match=r"127\.0\.0\.1:1"):
            call()
    store.close()
