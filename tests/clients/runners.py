"""The programs that run conformance tasks, one a language: how each is built, started and asked."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.clients.relay import has_nothing_to_do

ROOT = Path(__file__).parents[2]
CLIENTS = ROOT / "clients"
_TASK_TIMEOUT_S = 120.0
# Compiling a client and what it needs: minutes, where the machine is slow and nothing is cached.
_BUILD_TIMEOUT_S = 1200.0
BUILD_AND_TESTS_TIMEOUT_S = 1500

Json = dict[str, Any]


@dataclass(frozen=True)
class Language:
    """How a client's runner comes about.

    Args:
        needs: programs, or paths of files, that have to be there.
        build: makes the runner, and touches nothing where nothing has changed; see `made`.
        command: starts it.
        is_required: it may not be left out on CI.
    """

    needs: Sequence[str]
    build: Callable[[], None]
    command: Sequence[str]
    is_required: bool = True

    def made(self) -> None:
        """Makes the runner: one test process at a time, as all of them build in the client's folder."""
        folder = os.open(CLIENTS, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            self.build()
        finally:
            os.close(folder)

    def missing(self) -> str:
        """Which of its needs is missing; "" where none is."""
        return next((need for need in self.needs if not _is_there(need)), "")


def _is_there(need: str) -> bool:
    return Path(need).exists() if need.startswith("/") else shutil.which(need) is not None


def _nothing() -> None:
    pass


_NODE = CLIENTS / "node"
_NODE_RUNNER = _NODE / "dist/conformance/runner.js"
_PROTOS = ROOT / "protos"
_MADE = {"node_modules", "dist", "gen"}


def _build_node() -> None:
    installed = _NODE / "node_modules/.package-lock.json"
    wanted = _NODE / "package-lock.json"
    if not installed.exists() or installed.stat().st_mtime < wanted.stat().st_mtime:
        build_with("npm", "ci", "--no-audit", "--no-fund", cwd=_NODE)
    sources = [path for path in _NODE.glob("*/**/*.ts") if not _MADE & set(path.parts)]
    built = _NODE_RUNNER.stat().st_mtime if _NODE_RUNNER.exists() else 0.0
    if built < max(path.stat().st_mtime for path in (wanted, *_PROTOS.rglob("*.proto"), *sources)):
        build_with("npm", "run", "build", cwd=_NODE)


_GO = CLIENTS / "go"
_GO_RUNNER = _GO / "build/bin/conformance"
# Debian's Go libraries; of protobuf the version that knows optional fields.
_GOCODE = f"{os.environ.get('GOCODE', '/usr/share/gocode')}/src"
_GO_LIBRARIES = (
    f"{_GOCODE}/google.golang.org/grpc/clientconn.go",
    f"{_GOCODE}/github.com/golang/protobuf/proto/registry.go",
)


def go(*arguments: str) -> None:
    """Runs a go command for the Go client, without a network."""
    build_with(str(_GO / "offline.sh"), *arguments)


def _build_go() -> None:
    # As its own tests are: one compilation of the libraries serves both.
    go("build", "-race", "-o", str(_GO_RUNNER), "millrace.io/millrace/conformance")


_JAVA = CLIENTS / "java"
# Debian's; where these are, what they need is too.
_JARS = ("grpc-netty", "netty-tcnative", "perfmark-api", "gson", "junit-platform-console")
_JAVA_NEEDS = (
    *("javac", "make", "protoc", "grpc_java_plugin"),
    *(f"/usr/share/java/{jar}.jar" for jar in _JARS),
)
# One process runs all scenarios: it is to start quickly, not to become fast.
_JAVA_COMMAND = (
    *(str(_JAVA / "build/java"), "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC"),
    "dev.millrace.conformance.Runner",
)


def _build_java() -> None:
    build_with("make", f"PYTHON={sys.executable}", cwd=_JAVA)


_CPP = CLIENTS / "cpp"
_CPP_BUILD = _CPP / "build"
_CPP_NEEDS = (
    *("cmake", "c++", "protoc", "grpc_cpp_plugin", "/usr/include/google/protobuf/message.h"),
    *("/usr/include/grpcpp/grpcpp.h", "/usr/include/nlohmann/json.hpp"),
    "/usr/include/doctest/doctest.h",
)


def _build_cpp() -> None:
    protos = f"-DMILLRACE_GOOGLEAPIS={sysconfig.get_path('purelib')}"
    build_with("cmake", "-B", str(_CPP_BUILD), "-DMILLRACE_TESTS=ON", protos, cwd=_CPP)
    build_with("cmake", "--build", str(_CPP_BUILD), "--parallel", "2", cwd=_CPP)


_PYTHON = (sys.executable, str(CLIENTS / "conformance/python_runner.py"))
LANGUAGES = {
    "python": Language((), _nothing, _PYTHON),
    "python-async": Language((), _nothing, (*_PYTHON, "--async")),
    "node": Language(("node", "npm"), _build_node, ("node", str(_NODE_RUNNER))),
    "go": Language(
        ("go", "gcc", *_GO_LIBRARIES),
        _build_go,
        ("env", "GORACE=halt_on_error=1", str(_GO_RUNNER)),  # a race fails its scenario
    ),
    "java": Language(_JAVA_NEEDS, _build_java, _JAVA_COMMAND),
    "java-async": Language(_JAVA_NEEDS, _build_java, (*_JAVA_COMMAND, "--async")),
    "cpp": Language(_CPP_NEEDS, _build_cpp, (str(_CPP_BUILD / "runner"),)),
}


class Runner:
    """A running runner; a context manager. Builds it first."""

    def __init__(self, language: Language) -> None:
        language.made()
        self._command = language.command
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    def rests(self) -> bool:
        """Claims that it has taken in all that has arrived."""
        assert self._process is not None, "it was not started"
        return has_nothing_to_do(self._process.pid)

    def run(self, task: Json) -> list[Json]:
        """The results of the task's actions."""
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        # A client that hangs fails its scenario, and the next one gets a fresh process.
        timer = threading.Timer(_TASK_TIMEOUT_S, process.kill)
        timer.start()
        process.stdin.write(json.dumps(task) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        timer.cancel()
        assert line, f"the runner ended, or took over {_TASK_TIMEOUT_S:.0f} s"
        results: list[Json] = json.loads(line)["results"]
        return results

    def _running(self) -> "subprocess.Popen[str]":
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
                env={**os.environ, "GRPC_VERBOSITY": "NONE"},
            )  # fmt: skip
        return self._process


def build_with(*command: str, cwd: Path = ROOT) -> None:
    """Runs one step of a build; its output is the failure."""
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
