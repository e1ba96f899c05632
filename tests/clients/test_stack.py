"""A stack that cannot start leaves nothing behind."""

import socket
import tempfile
from pathlib import Path

import pytest
from millrace.cli.failures import CommandFailed
from millrace.cli.stack import Stack, _without_security


def test_busy_port_leaves_no_folder_and_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    with socket.create_server(("127.0.0.1", 0)) as busy:
        address = f"127.0.0.1:{busy.getsockname()[1]}"
        stack = Stack(tmp_path / "state", address, "127.0.0.1:0")
        for _ in range(2):  # a lock that is left would be found the second time
            with pytest.raises(CommandFailed, match="cannot listen"), stack:
                pass
    assert list(temporary.iterdir()) == []


def test_local_daemons_start_without_the_security_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`millrace keys` and fleet daemons share these variables; a loopback stack has no use for them."""
    theirs = ("MILLRACE_API_KEYS", "MILLRACE_TLS_CERT", "MILLRACE_PEER_TLS_CA")
    for name in (*theirs, "MILLRACE_LOG_LEVEL"):
        monkeypatch.setenv(name, "x")
    environ = _without_security()
    assert not set(theirs) & set(environ)
    assert environ["MILLRACE_LOG_LEVEL"] == "x"
