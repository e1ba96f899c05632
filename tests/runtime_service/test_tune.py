"""The program behind `millrace tune`: found, measured by a script, published, and used by runtimes that come later."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from millrace.artifact.v1 import artifact_pb2_grpc
from millrace.compiler.v1 import compiler_pb2_grpc
from prometheus_client import CollectorRegistry

from compiler_service.artifact_service import ArtifactService
from compiler_service.service import CompilerService
from runtime_service.engine_source import EngineSource
from runtime_service.settings import RuntimeSettings
from runtime_service.tune import run
from shared.engine import EngineManifest, EngineSelector
from shared.errors import EngineNotFound, EngineNotTrusted, InvalidField, TuningRefused
from shared.server import DaemonServer
from shared.settings import SettingsError
from shared.store import LocalStore
from shared.store.remote import GrpcStore
from shared.tuning import MAX_TUNINGS, TunedSite, TuningRecord
from tests.shared.engines import INT8, engine_key, publish_engine
from tests.shared.test_signing import KEY, key_file, signature
from tests.shared.tunings import GPU, SITE, record_bytes, record_of

_SELECTOR = EngineSelector("tiny", "sm_90", INT8)


def _settings(store: object, *more: str) -> RuntimeSettings:
    flags = ["--store", str(store), "--model", "tiny", "--arch", "sm_90", *more]
    return RuntimeSettings.parse(flags, {})


def _measured(
    local: LocalStore, engine: EngineManifest, on_site: Callable[[TunedSite], None]
) -> TuningRecord:
    """A GPU that is measured at once."""
    assert local.get(engine.name).manifest == engine.manifest, "it is not here whole"
    on_site(SITE)
    return record_of(engine)


def _not_measured(
    local: LocalStore, engine: EngineManifest, on_site: Callable[[TunedSite], None]
) -> TuningRecord:
    raise AssertionError("an engine was measured")


@asynccontextmanager
async def _compile_daemon(store: LocalStore) -> AsyncIterator[str]:
    """The services of a compile daemon that builds nothing, at an address."""
    server = DaemonServer("127.0.0.1:0", 1 << 20, CollectorRegistry())
    artifact_pb2_grpc.add_ArtifactServiceServicer_to_server(ArtifactService(store), server.grpc)
    nothing = cast(Any, None)
    compiler = CompilerService(nothing, nothing, store)
    compiler_pb2_grpc.add_CompilerServiceServicer_to_server(compiler, server.grpc)
    await server.start("millrace.compiler.v1.CompilerService", is_serving=True)
    try:
        yield server.address
    finally:
        await server.grpc.stop(0)


def test_record_is_kept_with_the_engine_that_was_measured(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    engine, said = publish_engine(store, engine_key("sm_90")), list[dict[str, Any]]()
    run(_settings(tmp_path), said.append, _measured)
    (tuning,) = store.get(engine.name).tunings
    assert (tuning.title, store.read_all(tuning.digest)) == (GPU, record_bytes(engine))
    assert said[0]["site"]["choice"] == "b"
    assert (said[-1]["engine"], said[-1]["published"]) == (engine.name, ["local"])
    assert said[-1]["record"]["engine"] == engine.manifest.digest


async def test_fleet_tunes_once(tmp_path: Path) -> None:
    """Measured on one machine, published through the compile daemon, found by a runtime that had the engine before."""
    central, mine, others = (LocalStore(tmp_path / name) for name in ("central", "a", "b"))
    engine = publish_engine(central, engine_key("sm_90"))
    async with _compile_daemon(central) as address:
        another = EngineSource(others, GrpcStore(address), "")
        before = await another.find(_SELECTOR, "", lambda: None)
        assert before.tunings == ()
        said: list[dict[str, Any]] = []
        flags = ("--cache", str(mine.root))
        settings = _settings(f"grpc://{address}", *flags)
        await asyncio.to_thread(run, settings, said.append, _measured)
        assert said[-1]["published"] == ["local", "remote"]
        found = await another.find(_SELECTOR, "", lambda: None)
    for store in (central, mine, others):
        (tuning,) = store.get(engine.name).tunings
        assert store.read_all(tuning.digest) == record_bytes(engine)
    assert found.tunings == central.get(engine.name).tunings


async def test_runtime_serves_where_no_record_can_be_asked_for(tmp_path: Path) -> None:
    central, local = (LocalStore(tmp_path / name) for name in ("central", "local"))
    engine = publish_engine(central, engine_key("sm_90"))
    async with _compile_daemon(central) as address:
        source = EngineSource(local, GrpcStore(address), "")
        await source.find(_SELECTOR, "", lambda: None)
    assert (await source.find(_SELECTOR, "", lambda: None)).name == engine.name


async def test_compile_daemon_keeps_only_records_of_its_engines(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    engine, other = (publish_engine(store, engine_key("sm_90", builder=b)) for b in "12")
    async with _compile_daemon(store) as address:
        remote = GrpcStore(address)

        async def add(gpu: str, record: bytes) -> EngineManifest:
            return await asyncio.to_thread(remote.add_tuning, engine, gpu, record)

        for gpu, record, error, problem in (
            (GPU, record_bytes(other), TuningRefused, "with the engine of manifest"),
            ("Another", record_bytes(engine), TuningRefused, f"measured on '{GPU}'"),
            (GPU, b"{}", TuningRefused, "malformed"),
            ("../x", record_bytes(engine, "../x"), InvalidField, "no name of a GPU"),
        ):
            with pytest.raises(error, match=problem):
                await add(gpu, record)
        assert store.get(engine.name).tunings == ()
        assert (await add(GPU, record_bytes(engine))).tunings == store.get(engine.name).tunings
        for number in range(1, MAX_TUNINGS):
            store.add_tuning(engine, f"GPU {number}", record_bytes(engine, f"GPU {number}"))
        with pytest.raises(InvalidField, match="one of over"):
            await add("one more", record_bytes(engine, "one more"))
        await add(GPU, record_bytes(engine, choice="c"))


def test_trusted_keys_hold_for_measuring_and_records_need_no_signature(tmp_path: Path) -> None:
    """A record holds no code: it chooses among what was signed."""
    store = LocalStore(tmp_path / "store")
    engine = publish_engine(store, engine_key("sm_90"))
    settings = _settings(store.root, "--trusted-keys", str(key_file(tmp_path / "keys", KEY)))
    with pytest.raises(EngineNotTrusted):
        run(settings, lambda line: None, _not_measured)
    store.add_signature(engine, signature(KEY, engine))
    run(settings, lambda line: None, _measured)
    tuned = store.get(engine.name)
    assert len(tuned.tunings) == 1
    assert tuned.signatures == (signature(KEY, engine),)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--arch", "cpu", "--model", "tiny"], "nothing to choose"),
        (["--arch", "sm_90"], "--model says which engine"),
    ],
)
def test_what_cannot_be_measured_is_told(flags: list[str], problem: str, tmp_path: Path) -> None:
    settings = RuntimeSettings.parse(["--store", str(tmp_path), *flags], {})
    with pytest.raises(SettingsError, match=problem):
        run(settings, lambda line: None, _not_measured)


def test_engine_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(EngineNotFound):
        run(_settings(tmp_path), lambda line: None, _not_measured)
