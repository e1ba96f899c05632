"""A real daemon as a process: its log lines are what tests wait for."""

import json
import os
import signal
import subprocess
import sys
import threading
from typing import Any, Self

# It imports torch, on a machine that does much beside.
_START_S = 240.0


class DaemonProcess:
    """`python -m MODULE FLAGS`, logging JSON; has bound its address when it is made.

    Args:
        wrapper: a command that runs it, such as `prlimit`.
    """

    def __init__(self, module: str, *flags: str, wrapper: tuple[str, ...] = ()) -> None:
        environ = {k: v for k, v in os.environ.items() if not k.startswith("MILLRACE_")}
        self.process = subprocess.Popen(
            [*wrapper, sys.executable, "-m", module, "--log-format", "json", *flags],
            stderr=subprocess.PIPE,
            text=True,
            env={**environ, "OMP_NUM_THREADS": "1"},
        )
        self.lines: list[dict[str, Any]] = []
        self._has_line = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.address = str(self.wait_for("server_started")["address"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait_for(self, event: str, **fields: Any) -> dict[str, Any]:
        """The first log line of that event, with those fields."""
        found: list[dict[str, Any]] = []
        wanted = {"event": event, **fields}

        def is_there() -> bool:
            found[:] = [line for line in self.lines if wanted.items() <= line.items()]
            return bool(found) or self.process.poll() is not None

        with self._has_line:
            self._has_line.wait_for(is_there, _START_S)
        assert found, f"no {event} in {self.lines[-20:]}"
        return found[0]

    def send(self, number: signal.Signals) -> None:
        """Signals the process."""
        self.process.send_signal(number)

    def close(self) -> None:
        """Kills the process, if it has not ended."""
        self.process.kill()
        self.process.wait()
        self._reader.join()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for text in self.process.stderr:
            try:
                line = json.loads(text)
            except ValueError:
                line = {"event": "", "text": text}
            with self._has_line:
                self.lines.append(line)
                self._has_line.notify_all()
        self.process.wait()
        with self._has_line:
            self._has_line.notify_all()
