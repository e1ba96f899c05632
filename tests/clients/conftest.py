"""Fixtures of the client tests."""

from collections.abc import Iterator

import millrace
import pytest

from tests.clients.scripted_daemon import Script, ScriptedDaemon


@pytest.fixture
def script() -> Script:
    """What the scripted daemon does; tests change it."""
    return Script()


@pytest.fixture
def daemon(script: Script) -> Iterator[ScriptedDaemon]:
    """Both daemons, scripted, at one address."""
    with ScriptedDaemon(script) as server:
        yield server


@pytest.fixture
def client(daemon: ScriptedDaemon) -> millrace.Client:
    """A client of both."""
    return millrace.Client(daemon.address, daemon.address)
