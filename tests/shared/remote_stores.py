"""Fixtures of stores elsewhere: a bucket and a repository of the test's own on real servers."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shared.engine import Blob
from shared.store import open_store
from shared.store.registry import Registry
from shared.store.registry_store import RegistryStore
from tests.shared.store_servers import S3Server, oci_registry, s3_server

BUCKET = "engines"
_names = itertools.count()


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A running S3 with an empty bucket."""
    with s3_server(tmp_path_factory.mktemp("s3"), BUCKET) as server:
        yield server


@pytest.fixture(scope="session")
def registry_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the registry keeps what it has."""
    return tmp_path_factory.mktemp("registry")


@pytest.fixture(scope="session")
def registry_address(registry_folder: Path) -> Iterator[str]:
    """`host:port` of a running registry."""
    with oci_registry(registry_folder) as address:
        yield address


@pytest.fixture
def aws(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The S3, and the AWS variables that lead to it."""
    for name, value in s3.environ.items():
        monkeypatch.setenv(name, value)
    return s3


@pytest.fixture
def s3_url(aws: S3Server) -> str:
    """An empty place in the bucket."""
    return f"s3://{BUCKET}/test/{next(_names)}"


@pytest.fixture
def oci_url(registry_address: str) -> str:
    """A repository to which nothing was pushed."""
    return f"oci+http://{registry_address}/test/{next(_names)}"


@pytest.fixture(params=["s3", "oci"])
def url(request: pytest.FixtureRequest) -> str:
    """An empty store elsewhere."""
    return str(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture
def remote(url: str) -> RegistryStore:
    """The store at `url`."""
    return opened(url)


def opened(url: str) -> RegistryStore:
    """The store at `url`, knowing nothing yet."""
    store = open_store(url)
    assert isinstance(store, RegistryStore)
    return store


class RecordingRegistry:
    """A registry that tells what is done to it, and fails when it is told to.

    Args:
        before_write: called before each change with how many there were.
    """

    def __init__(
        self, registry: Registry, before_write: Callable[[int], None] = lambda _: None
    ) -> None:
        self._registry, self._before_write = registry, before_write
        self.url, self.check = registry.url, registry.check
        self.has, self.manifest, self.tags = registry.has, registry.manifest, registry.tags
        self.adopt, self.sweep, self.settle_s = registry.adopt, registry.sweep, registry.settle_s
        self.uploads: list[str] = []
        self.reads: list[tuple[str, int]] = []
        self.num_writes = 0

    def read(self, digest: str, offset: int = 0) -> Iterator[bytes]:
        self.reads.append((digest, offset))
        return self._registry.read(digest, offset)

    def upload(self, blob: Blob, content: Path | bytes) -> None:
        self._write()
        self.uploads.append(blob.digest)
        self._registry.upload(blob, content)

    def put_manifest(
        self, content: bytes, media_type: str, tag: str = "", replaces: str | None = None
    ) -> Blob:
        self._write()
        return self._registry.put_manifest(content, media_type, tag, replaces)

    def delete_manifest(self, digest: str) -> None:
        self._write()
        self._registry.delete_manifest(digest)

    def _write(self) -> None:
        self._before_write(self.num_writes)
        self.num_writes += 1
