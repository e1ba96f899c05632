"""The `millrace` command as a process: without a terminal, or on one."""

import os
import pty
import signal
import subprocess
import sys

from tests.clients.scripted_daemon import ScriptedDaemon

COMMAND = (sys.executable, "-m", "millrace.cli")


def millrace(
    daemon: ScriptedDaemon | None, *arguments: str, stdin: str = "", columns: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs the command against `daemon`, with no terminal."""
    environ = {name: v for name, v in os.environ.items() if not name.startswith("MILLRACE_")}
    if daemon is not None:
        for name in ("COMPILER", "RUNTIME", "GATEWAY"):
            environ[f"MILLRACE_CLI_{name}"] = daemon.address
    if columns is not None:
        environ["COLUMNS"] = str(columns)
    return subprocess.run(
        [*COMMAND, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        env=environ,
    )


def on_a_terminal(
    daemon: ScriptedDaemon, *arguments: str, until: str = "", columns: int = 160
) -> str:
    """What the command shows on a terminal; Ctrl-C once it shows `until`."""
    environ = {**os.environ, "MILLRACE_CLI_COMPILER": daemon.address, "TERM": "xterm-256color",
               "MILLRACE_CLI_GATEWAY": daemon.address, "COLUMNS": str(columns), "LINES": "50"}  # fmt: skip
    environ.pop("NO_COLOR", None)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, env=environ
    )
    os.close(theirs)
    shown = bytearray()
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the terminal closed with its last process
            break
        if not part:
            break
        shown += part
        if until and until.encode() in shown:
            process.send_signal(signal.SIGINT)
            until = ""
    process.wait(120)
    os.close(ours)
    return shown.decode(errors="replace")
