"""A cache of limited size: what was not used for longest goes, what is held stays."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from shared.engine import EngineManifest
from shared.errors import BlobNotFound, CacheTooSmall, EngineNotFound
from shared.store import LocalStore
from shared.store.cache import EngineCache
from tests.shared.engines import REPOSITORY, engine_key, publish_engine, weight_bytes

WEIGHTS = 100_000
# An engine of these weights, and what goes with it.
ENGINE = WEIGHTS + 5_000


@pytest.fixture
def source(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "source")


@pytest.fixture
def engines(source: LocalStore) -> list[EngineManifest]:
    """Three engines, each of its own weights."""
    return [
        publish_engine(source, engine_key(model=name), name, weights=weight_bytes(WEIGHTS, seed))
        for seed, name in enumerate("abc")
    ]


def cache_of(tmp_path: Path, num_engines: float) -> EngineCache:
    """A cache with room for about so many of them."""
    return EngineCache(LocalStore(tmp_path / "cache"), int(num_engines * ENGINE))


def used_at(cache: EngineCache, engine: EngineManifest, time_s: float) -> None:
    """Says when the engine was last used."""
    os.utime(cache.local.root / "engines" / engine.key.digest, (time_s, time_s))


def names(cache: EngineCache) -> set[str]:
    """The models whose engines are here."""
    return {engine.model for engine in cache.local.list()}


def test_engine_that_was_not_used_for_longest_makes_room(
    tmp_path: Path, source: LocalStore, engines: list[EngineManifest]
) -> None:
    cache = cache_of(tmp_path, 2.5)
    for time_s, engine in enumerate(engines[:2]):
        cache.pull(source, engine)
        used_at(cache, engine, 1000.0 + time_s)
    used_at(cache, engines[0], 2000.0)
    cache.pull(source, engines[2])
    assert names(cache) == {"a", "c"}
    assert cache.local.blobs.total_bytes() <= cache.max_bytes
    for engine in cache.local.list():
        cache.local.verify(engine)


def test_holding_an_engine_is_using_it(
    tmp_path: Path, source: LocalStore, engines: list[EngineManifest]
) -> None:
    cache = cache_of(tmp_path, 2.5)
    for time_s, engine in enumerate(engines[:2]):
        cache.pull(source, engine)
        used_at(cache, engine, 1000.0 + time_s)
    cache.hold(engines[0]).release()
    cache.pull(source, engines[2])
    assert names(cache) == {"a", "c"}


def test_held_engine_stays_however_old_it_is(
    tmp_path: Path, source: LocalStore, engines: list[EngineManifest]
) -> None:
    cache = cache_of(tmp_path, 2.5)
    for engine in engines[:2]:
        cache.pull(source, engine)
    held = cache.hold(engines[0])
    used_at(cache, engines[0], 1.0)
    cache.pull(source, engines[2])
    assert names(cache) == {"a", "c"}
    held.release()
    used_at(cache, engines[0], 1.0)
    cache.pull(source, engines[1])
    assert names(cache) == {"b", "c"}


def test_engine_that_another_process_holds_stays_until_that_ends(
    tmp_path: Path, source: LocalStore, engines: list[EngineManifest]
) -> None:
    cache = cache_of(tmp_path, 1.5)
    cache.pull(source, engines[0])
    program = (
        "import sys; from shared.store import LocalStore\n"
        "store = LocalStore(sys.argv[1]); pin = store.hold(store.get(sys.argv[2]))\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(cache.local.root), engines[0].name]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(CacheTooSmall):
        cache.pull(source, engines[1])
    assert names(cache) == {"a"}
    process.kill()
    process.wait()
    cache.pull(source, engines[1])
    assert names(cache) == {"b"}


def test_engine_larger_than_the_cache_is_refused_before_it_is_fetched(
    tmp_path: Path, source: LocalStore, engines: list[EngineManifest]
) -> None:
    class NotRead(LocalStore):
        def read(self, digest: str, offset: int = 0) -> Iterator[bytes]:
            raise AssertionError

    cache = cache_of(tmp_path, 0.5)
    with pytest.raises(CacheTooSmall, match="raise --cache-bytes") as refused:
        cache.pull(NotRead(source.root), engines[0])
    assert int(refused.value.fields["needed_bytes"]) > cache.max_bytes
    assert refused.value.fields["used_bytes"] == "0"


def test_engine_that_cannot_fit_makes_nobody_go(
    tmp_path: Path, source: LocalStore, engines: list[EngineManifest]
) -> None:
    """Neither one larger than the cache, nor one for which too much is held."""
    cache = cache_of(tmp_path, 2.5)
    for engine in engines[:2]:
        cache.pull(source, engine)
    for size, is_held in ((3 * WEIGHTS, False), (2 * WEIGHTS, True)):
        large = publish_engine(
            source, engine_key(model=str(size)), "large", weights=weight_bytes(size, size)
        )
        held = cache.hold(engines[0]) if is_held else None
        with pytest.raises(CacheTooSmall) as refused:
            cache.pull(source, large)
        assert (int(refused.value.fields["used_bytes"]) > WEIGHTS) == is_held
        assert names(cache) == {"a", "b"}
        if held is not None:
            held.release()


def test_weights_that_stay_count_once(
    tmp_path: Path, source: LocalStore, engines: list[EngineManifest]
) -> None:
    """Two arches of one model share their weights: there is room for both."""
    cpu = engines[0]
    gpu = publish_engine(source, engine_key("sm_90", "a"), "a", weights=weight_bytes(WEIGHTS, 0))
    cache = cache_of(tmp_path, 1.2)
    cache.pull(source, cpu)
    cache.pull(source, gpu)
    assert len(cache.local.list()) == 2


def test_what_a_broken_pull_left_makes_room_for_others_and_helps_its_own(
    tmp_path: Path, source: LocalStore, engines: list[EngineManifest]
) -> None:
    class Breaking(LocalStore):
        def read(self, digest: str, offset: int = 0) -> Iterator[bytes]:
            for chunk in super().read(digest, offset):
                if len(chunk) < WEIGHTS // 2:
                    yield chunk
                else:
                    yield chunk[: WEIGHTS // 2]
                    raise BlobNotFound(digest=digest)

    class Recording(LocalStore):
        offsets: ClassVar[list[int]] = []

        def read(self, digest: str, offset: int = 0) -> Iterator[bytes]:
            self.offsets.append(offset)
            return super().read(digest, offset)

    cache = cache_of(tmp_path, 1.2)
    with pytest.raises(BlobNotFound):
        cache.pull(Breaking(source.root), engines[0])
    assert cache.local.blobs.total_bytes() > WEIGHTS // 2
    cache.pull(Recording(source.root), engines[0])
    assert WEIGHTS // 2 in Recording.offsets
    with pytest.raises(BlobNotFound):
        cache.pull(Breaking(source.root), engines[1])
    cache.pull(source, engines[2])
    assert names(cache) == {"c"}
    assert cache.local.blobs.total_bytes() <= cache.max_bytes


def test_engine_that_went_cannot_be_held(
    tmp_path: Path, source: LocalStore, engines: list[EngineManifest]
) -> None:
    cache = cache_of(tmp_path, 2.5)
    cache.pull(source, engines[0])
    assert cache.local.evict(engines[0])
    with pytest.raises(EngineNotFound):
        cache.hold(engines[0])
    assert not list((cache.local.root / "pins").iterdir())


def test_trim_keeps_the_limit(
    tmp_path: Path, source: LocalStore, engines: list[EngineManifest]
) -> None:
    cache = cache_of(tmp_path, 1.2)
    for seed, name in enumerate("abc"):
        publish_engine(
            cache.local, engine_key(model=name), name, weights=weight_bytes(WEIGHTS, seed)
        )
        used_at(cache, engines[seed], 1000.0 - seed)
    cache.trim()
    assert names(cache) == {"a"}
    assert cache.local.blobs.total_bytes() <= cache.max_bytes


def test_cache_without_a_limit_keeps_all(
    tmp_path: Path, source: LocalStore, engines: list[EngineManifest]
) -> None:
    cache = EngineCache(LocalStore(tmp_path / "cache"), 0)
    for engine in engines:
        cache.pull(source, engine)
    cache.trim()
    assert names(cache) == {"a", "b", "c"}
