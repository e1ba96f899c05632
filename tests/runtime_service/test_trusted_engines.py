"""A runtime with trusted keys loads, and downloads, nothing that none of them signed."""

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from runtime_service.daemon import load_arguments
from runtime_service.engine_source import EngineSource
from runtime_service.execution.loader import load_engine
from runtime_service.settings import RuntimeSettings
from shared.engine import EngineManifest, EngineSelector
from shared.errors import DigestMismatch, EngineNotTrusted
from shared.signing import TrustedKeys
from shared.store import LocalStore
from shared.store.cache import EngineCache
from tests.runtime_service.daemon import FP32, publish_echo, running_daemon
from tests.shared.test_signing import KEY, OTHER, signature

ECHO = EngineSelector("echo", "cpu", FP32)


def trusting(key: Ed25519PrivateKey) -> TrustedKeys:
    """Trust in that key alone."""
    return TrustedKeys(frozenset({key.public_key().public_bytes_raw()}))


def source(local: LocalStore, remote: LocalStore | None) -> EngineSource:
    """Engines that `KEY` signed."""
    return EngineSource(local, remote, "", trusted=trusting(KEY))


def stores(tmp_path: Path) -> tuple[LocalStore, LocalStore, EngineManifest]:
    """A runtime's own store, another one, and the engine in that."""
    remote = LocalStore(tmp_path / "remote")
    return LocalStore(tmp_path / "local"), remote, publish_echo(remote)


def not_called() -> None:
    """No build is asked for."""
    raise AssertionError("a build was announced")


async def test_untrusted_engine_is_refused_before_it_is_downloaded(tmp_path: Path) -> None:
    local, remote, engine = stores(tmp_path)
    remote.add_signature(engine, signature(OTHER, engine))
    with pytest.raises(EngineNotTrusted, match="not trusted"):
        await source(local, remote).find(ECHO, "", not_called)
    assert local.list() == ()
    assert list((local.root / "blobs/sha256").iterdir()) == []


async def test_signed_engine_is_pulled_with_its_signature(tmp_path: Path) -> None:
    local, remote, engine = stores(tmp_path)
    remote.add_signature(engine, signature(KEY, engine))
    found = await source(local, remote).find(ECHO, "", not_called)
    assert found.signatures == (signature(KEY, engine),)
    assert (await source(local, None).find(ECHO, "", not_called)).name == engine.name


async def test_engine_that_was_signed_after_it_was_pulled_is_loaded(tmp_path: Path) -> None:
    local, remote, engine = stores(tmp_path)
    await EngineSource(local, remote, "").find(ECHO, "", not_called)
    with pytest.raises(EngineNotTrusted, match="is not signed"):
        await source(local, remote).find(ECHO, "", not_called)
    remote.add_signature(engine, signature(KEY, engine))
    await source(local, remote).find(ECHO, "", not_called)
    assert local.get(engine.name).signatures == (signature(KEY, engine),)


@pytest.mark.parametrize("is_cache", [False, True])
@pytest.mark.parametrize("builder", ["test", "newer"])
async def test_engine_that_others_made_and_signed_takes_the_place_of_an_unsigned_one(
    tmp_path: Path, builder: str, is_cache: bool
) -> None:
    """Also under the same name: calibrated engines of one key may differ, and the first push wins."""
    local, remote = LocalStore(tmp_path / "local"), LocalStore(tmp_path / "remote")
    unsigned = publish_echo(local, arch_error=True)
    engine = publish_echo(remote, builder=builder)
    cache = EngineCache(local, 0) if is_cache else None
    runtimes = EngineSource(local, remote, "", trusted=trusting(KEY), cache=cache)
    with pytest.raises(EngineNotTrusted, match="is not signed"):
        await runtimes.find(ECHO, "", not_called)
    signed = remote.add_signature(engine, signature(KEY, engine))
    held = local.hold(unsigned)
    assert await runtimes.find(ECHO, "", not_called) == signed
    local.sweep(grace_s=0.0)
    local.verify(signed)
    for blob in unsigned.layers:  # a runtime that trusts anybody may serve it still
        local.verified_path(blob.digest)
    held.release()
    assert local.get(signed.name) == signed


async def test_engine_that_others_signed_takes_nobodys_place(tmp_path: Path) -> None:
    local, remote = LocalStore(tmp_path / "local"), LocalStore(tmp_path / "remote")
    unsigned = publish_echo(local, arch_error=True)
    remote.add_signature(publish_echo(remote), signature(OTHER, publish_echo(remote)))
    with pytest.raises(EngineNotTrusted, match="is not signed"):
        await source(local, remote).find(ECHO, "", not_called)
    assert local.list() == (unsigned,)


async def test_engine_in_the_runtimes_own_store_is_checked_too(tmp_path: Path) -> None:
    """Also one that is repaired; and a refusal leaves what is served."""
    async with running_daemon(tmp_path) as daemon:
        served = daemon.runtime.served
        daemon.runtime.keeper._starter._source = source(daemon.store, None)
        with pytest.raises(EngineNotTrusted):
            await daemon.load()
        assert daemon.runtime.served is served
        assert served is not None
        remote = LocalStore(tmp_path / "remote")
        publish_echo(remote)
        with pytest.raises(EngineNotTrusted):
            await source(daemon.store, remote).repair(served.engine, ECHO, "", not_called)


async def test_what_took_the_checked_engines_name_is_not_loaded(tmp_path: Path) -> None:
    """It may do so before the engine process reads the store, or before that is started again."""
    local, _, _ = stores(tmp_path)
    engine = publish_echo(local)
    local.add_signature(engine, signature(KEY, engine))
    checked = await source(local, None).find(ECHO, "", not_called)
    arguments = load_arguments(RuntimeSettings.parse([], {}), local, checked)
    local.delete(engine.name)
    other = publish_echo(local, arch_error=True)
    assert other.name == engine.name
    with pytest.raises(DigestMismatch, match=other.manifest.digest):
        load_engine(**arguments)
