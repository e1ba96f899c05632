"""What the `millrace` command makes of mistakes: one line on stderr, an exit code, no traceback."""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from millrace.compiler.v1 import compiler_pb2

from shared.errors import Unauthenticated
from tests.clients.command import COMMAND, millrace
from tests.clients.scripted_daemon import Script, ScriptedDaemon, a_build
from tests.shared.certificates import made_in

_TOO_MANY = str(1 << 70)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("generate", "hi", "--seed", "-1"), "seed: out of range, found -1."),
        (("generate", "hi", "--seed", _TOO_MANY), f"seed: out of range, found {_TOO_MANY}."),
        (("generate", "hi", "-m", _TOO_MANY), "max_new_tokens: out of range"),
        (("build", "m", "--calibration-tokens", _TOO_MANY), "calibration_tokens: out of range"),
        (("deploy", "d", "--model", "m", "--replicas", _TOO_MANY), "replicas: out of range"),
        (
            ("up", "--state", "{tmp}/up", "--compiler", "here"),
            "'here' is not of the form host:port",
        ),
        (("builds", "--compiler", "here"), "'here' is not of the form host:port"),
        (
            ("generate", "hi", "--runtime", "http://h:1"),
            "'http://h:1' is not of the form host:port",
        ),
        (("status", "--gateway", "h:port"), "'h:port' is not of the form host:port"),
        (("health", "here"), "'here' is not of the form host:port"),
        (("top",), "top needs a terminal; `millrace status` prints the fleet once"),
        (("bench", "serve", "--openai", "here"), "'here' is not of the form http://host:port/v1"),
        (("sign", "m", "--key", "{tmp}/file"), "{tmp}/file holds no private key in PEM"),
    ],
)
def test_wrong_input_exits_with_2_in_one_line(
    arguments: tuple[str, ...], problem: str, daemon: ScriptedDaemon, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no key")
    done = millrace(daemon, *(argument.replace("{tmp}", str(tmp_path)) for argument in arguments))
    assert (done.returncode, done.stdout) == (2, "")
    *before, last = done.stderr.splitlines()
    assert last.startswith(f"millrace: {problem.replace('{tmp}', str(tmp_path))}")
    assert len(before) <= 1, "more than what is being started"


@pytest.mark.parametrize(
    "arguments",
    [
        ("certs", "{file}/tls"),
        ("up", "--state", "{file}/state"),
        ("keys", "create", "acme", "--file", "{file}/keys.json"),
    ],
)
def test_folder_that_cannot_be_made_is_told_in_one_line(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.touch()
    done = millrace(None, *(argument.replace("{file}", str(file)) for argument in arguments))
    assert done.returncode in (1, 2)
    *before, last = done.stderr.splitlines()
    assert last.startswith("millrace: ")
    assert str(file) in last
    assert len(before) <= 1, "more than what is being started"


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", b"caf\xe9"),
        ("generate", "-"),
        ("generate", "--chat", b"caf\xe9"),
        ("build", b"caf\xe9"),
        ("deploy", "chat", "--model", b"caf\xe9"),
    ],
)
def test_input_that_is_not_utf8_is_told_in_one_line(
    daemon: ScriptedDaemon, arguments: tuple[str | bytes, ...]
) -> None:
    addresses = {f"MILLRACE_CLI_{n}": daemon.address for n in ("COMPILER", "RUNTIME", "GATEWAY")}
    done = subprocess.run(
        [*COMMAND, *arguments],
        input=b"caf\xe9",
        capture_output=True,
        timeout=120,
        env={**os.environ, **addresses},
    )
    assert done.returncode == 2
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("millrace: ")
    assert "is not UTF-8, found " in line


def test_no_name_cancels_no_build(daemon: ScriptedDaemon, script: Script) -> None:
    script.builds = [a_build(compiler_pb2.BUILD_STATE_QUEUED)]
    done = millrace(daemon, "cancel", "")
    assert done.returncode == 3
    assert done.stderr == "millrace: no build begins with ''; see `millrace builds`\n"


def test_daemon_of_another_kind_is_named() -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        done = millrace(None, "status", "--gateway", address)
    finally:
        server.stop(None)
    assert done.returncode == 1
    assert done.stderr == (
        f"millrace: The daemon at {address} does not offer this: it is of another kind, or older.\n"
    )


def test_failed_handshake_is_told_in_one_line(daemon: ScriptedDaemon, tmp_path: Path) -> None:
    """gRPC's core would tell it too, in lines of its own."""
    ca = made_in(tmp_path) / "ca.crt"
    done = millrace(daemon, "--tls-ca", str(ca), "status")
    assert done.returncode == 4
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"millrace: {daemon.address} cannot be spoken to: ")


def test_missing_key_is_told_with_where_the_command_takes_it_from(
    daemon: ScriptedDaemon, script: Script
) -> None:
    script.failures = [Unauthenticated(problem="This call carries no API key")]
    done = millrace(daemon, "builds")
    assert done.returncode == 1
    assert done.stderr.endswith("The command takes it from MILLRACE_CLI_API_KEY.\n")


def test_daemon_elsewhere_that_does_not_answer_is_told_with_the_reason() -> None:
    done = millrace(None, "builds", "--compiler", "no-such-host.invalid:7601")
    assert done.returncode == 4
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("millrace: No daemon answers at no-such-host.invalid:7601 (")
    assert "millrace up" not in done.stderr, "it would start one here"


def test_keys_of_a_missing_file_are_told_how_to_make_one(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    done = millrace(None, "keys", "list", "--file", str(path))
    assert done.returncode == 3
    assert done.stderr == (
        f"millrace: no key file {path}; make one with: millrace keys create TENANT --file {path}\n"
    )


def test_missing_gateway_is_told_what_starts_one() -> None:
    done = millrace(None, "status", "--gateway", "127.0.0.1:1")
    assert done.returncode == 4
    assert done.stderr == (
        "millrace: No daemon answers at 127.0.0.1:1; "
        "start one with: millrace up --runtimes 2 --gateway 127.0.0.1:1\n"
    )
