"""Empty stores in folders, for the tests of the store."""

from pathlib import Path

import pytest

from shared.store import LocalStore


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """A store of a test's own."""
    return LocalStore(tmp_path / "store")


@pytest.fixture
def local(tmp_path: Path) -> LocalStore:
    """The store here, where another is elsewhere."""
    return LocalStore(tmp_path / "local")


@pytest.fixture
def other(tmp_path: Path) -> LocalStore:
    """A third one, into which engines are pulled."""
    return LocalStore(tmp_path / "other")
