"""Daemons end when they are told to, at any moment, also as PID 1: there the kernel does nothing for them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

NAMESPACE = ("unshare", "--fork", "--pid", "--kill-child=SIGKILL")
IS_ALLOWED = (
    shutil.which("unshare") is not None
    and subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode == 0
)

pytestmark = pytest.mark.skipif(not IS_ALLOWED, reason="no PID namespaces here")

BIN = Path(sys.executable).parent
DAEMONS = {
    "compiler": ("compiler_service", ("--no-worker",)),
    "runtime": ("runtime_service", ()),
    "gateway": ("runtime_service.gateway", ("--runtimes", "127.0.0.1:1", "--http-listen", "")),
}
STOP_S = 60.0


@contextmanager
def first_process(
    daemon: str, tmp_path: Path, *, is_script: bool = False, modules: Path | None = None
) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """A daemon that is PID 1 of a namespace, and its id here.

    Args:
        modules: a folder whose modules it imports in place of others.
    """
    module, flags = DAEMONS[daemon]
    program = [str(BIN / f"millrace-{daemon}")] if is_script else [sys.executable, "-m", module]
    environ = {k: v for k, v in os.environ.items() if not k.startswith("MILLRACE_")}
    environ["MILLRACE_STORE"] = str(tmp_path / "store")
    environ["MILLRACE_COMPILER_STATE_DIR"] = str(tmp_path / "state")
    environ["MILLRACE_COMPILER_CACHE_DIR"] = str(tmp_path / "cache")
    if modules is not None:
        environ["PYTHONPATH"] = str(modules)
    flags = ("--listen", "127.0.0.1:0", "--metrics-listen", "", "--log-format", "json", *flags)
    process = subprocess.Popen(
        [*NAMESPACE, *program, *flags], env=environ, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process, _child_of(process)
    finally:
        process.kill()
        process.wait()


def _child_of(process: "subprocess.Popen[str]") -> int:
    deadline_s = time.monotonic() + STOP_S
    while not (children := psutil.Process(process.pid).children()):
        assert time.monotonic() < deadline_s, "unshare started nothing"
    return int(children[0].pid)


def wait_until_it_listens_to(pid: int, number: signal.Signals) -> None:
    """Returns at the first moment at which the process can be sent a signal at all."""
    deadline_s = time.monotonic() + STOP_S
    while not _caught_by(pid) >> (number - 1) & 1:
        assert time.monotonic() < deadline_s, f"{number.name} is not handled"
        time.sleep(0.001)


def _caught_by(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("SigCgt:"))
    return int(line.split()[1], 16)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("daemon", DAEMONS)
def test_daemon_ends_before_it_has_begun(
    tmp_path: Path, daemon: str, number: signal.Signals
) -> None:
    """It listens while it imports what takes long; of that, gRPC takes for ever here."""
    endless = tmp_path / "modules" / "grpc"
    endless.mkdir(parents=True)
    (endless / "__init__.py").write_text("import time\ntime.sleep(3600)\n")
    is_script = number == signal.SIGINT
    with first_process(daemon, tmp_path, is_script=is_script, modules=endless.parent) as (
        process, pid,
    ):  # fmt: skip
        wait_until_it_listens_to(pid, signal.SIGTERM)
        os.kill(pid, number)
        assert process.wait(STOP_S) == 128 + number


@pytest.mark.parametrize("daemon", DAEMONS)
def test_daemon_that_serves_drains_and_ends(tmp_path: Path, daemon: str) -> None:
    with first_process(daemon, tmp_path) as (process, pid):
        assert process.stderr is not None
        seen = []
        for line in process.stderr:
            seen.append(json.loads(line)["event"] if line.startswith("{") else line)
            if seen[-1] == "server_started":
                os.kill(pid, signal.SIGTERM)
        assert process.wait(STOP_S) in (0, 128 + signal.SIGTERM), seen
