"""A secured stack of real processes: TLS, keys, scopes, quotas, signatures, and what logs hold."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from millrace.cli.certs import make_certs
from millrace.client import Client
from millrace.errors import MillraceError
from millrace.retries import Retries

from tests.checkpoints import write_checkpoint
from tests.integration.compiler_daemon import CompilerDaemon
from tests.integration.daemon_process import DaemonProcess
from tests.integration.test_command import COMMAND, ENVIRON
from tests.shared.certificates import let_expire

pytestmark = pytest.mark.redis

PROMPT = "the secret of the prompt"


@dataclass
class Stack:
    """Both daemons, secured, and the files around them."""

    compiler: CompilerDaemon
    runtime: DaemonProcess
    certs: Path
    others: Path
    keys: Path
    checkpoint: Path

    def key(self, tenant: str, *flags: str) -> str:
        """A new key."""
        made = self.run("", "keys", "create", tenant, "--file", str(self.keys), *flags)
        assert made.returncode == 0, made.stderr
        return made.stdout.strip()

    def run(self, key: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """A command with `key`, trusting the stack's CA."""
        variables = {
            "MILLRACE_CLI_COMPILER": self.compiler.address,
            "MILLRACE_CLI_RUNTIME": self.runtime.address,
            "MILLRACE_CLI_TLS_CA": str(self.certs / "ca.crt"),
            "MILLRACE_CLI_API_KEY": key,
        }
        return subprocess.run(
            [*COMMAND, *arguments],
            capture_output=True, text=True, timeout=120, env={**ENVIRON, **variables},
        )  # fmt: skip

    def client(self, key: str, folder: Path | None = None) -> Client:
        """The SDK's client with `key`, trusting the CA in the stack's folder or another one."""
        ca = str((folder or self.certs) / "ca.crt")
        addresses = (self.compiler.address, self.runtime.address)
        return Client(*addresses, retries=Retries(max_attempts=1), api_key=key, tls_ca=ca)


def refusals(stack: Stack, key: str, folder: Path | None = None) -> list[tuple[str, str]]:
    """Status and reason with which each daemon refuses `key`."""
    found = []
    with stack.client(key, folder) as client:
        for call in (client.get_status, lambda: next(iter(client.list_builds()), None)):
            with pytest.raises(MillraceError) as failed:
                call()
            found.append((failed.value.code.name, failed.value.reason))
    return found


def asked_for(stack: Stack, key: str, limit_s: float) -> None:
    """Asks with `key` for so long at most: a daemon sees a changed file within a second."""
    deadline = time.monotonic() + limit_s
    with stack.client(key) as client:
        while time.monotonic() < deadline:
            client.get_status()


def reason(call: Callable[[], object]) -> str:
    """Why `call` fails."""
    with pytest.raises(MillraceError) as failed:
        call()
    return failed.value.reason


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A compile daemon, and a runtime that pulls signed engines from it, with a key of its own."""
    root = tmp_path_factory.mktemp("secured")
    certs, others, keys = root / "certs", root / "others", root / "keys.json"
    make_certs(certs, (), "client", 2)
    make_certs(others, (), "client", 2)
    made = subprocess.run(
        [*COMMAND, "keys", "create", "fleet", "--file", str(keys), "--scope", "build"],
        capture_output=True, text=True, timeout=60, env=ENVIRON,
    )  # fmt: skip
    (root / "fleet.key").write_text(made.stdout)
    tls = ("--tls-cert", str(certs / "server.crt"), "--tls-key", str(certs / "server.key"))
    asks = (*tls, "--api-keys", str(keys))
    checkpoint = write_checkpoint(root / "model")
    with CompilerDaemon("", root, *asks) as compiler:
        flags = (
            "--listen", "127.0.0.1:0", "--metrics-listen", "", "--arch", "cpu", "--quant", "fp32",
            "--store", f"grpc://{compiler.address}", "--cache", str(root / "runtime"),
            "--peer-tls-ca", str(certs / "ca.crt"), "--peer-api-key-file", str(root / "fleet.key"),
            "--trusted-keys", str(certs / "signing.pub"), *asks,
        )  # fmt: skip
        with DaemonProcess("runtime_service", *flags) as runtime:
            yield Stack(compiler, runtime, certs, others, keys, checkpoint)


def test_secured_stack_builds_signs_serves_and_refuses(stack: Stack) -> None:
    """Each caller gets what its certificate, key, scopes and quota allow, and the right status."""
    ops = stack.key("ops", *(f"--scope={scope}" for scope in ("build", "generate", "admin")))
    # After what it is answered it waits for minutes.
    acme = stack.key("acme", "--tokens-per-min", "6")
    built = stack.run(ops, "build", str(stack.checkpoint), "--quant", "fp32", "--arch", "cpu",
                      "--name", "tiny")  # fmt: skip
    assert built.returncode == 0, built.stderr
    with stack.client(ops) as client:
        assert reason(lambda: client.load_engine("tiny", "fp32")) == "ENGINE_NOT_TRUSTED"
        signed = stack.run(ops, "sign", "tiny", "--key", str(stack.certs / "signing.key"))
        assert signed.returncode == 0, signed.stderr
        client.load_engine("tiny", "fp32")
    answered = stack.run(acme, "generate", PROMPT, "--max-tokens", "4", "--ignore-end")
    assert answered.returncode == 0, answered.stderr
    assert stack.run("", "health", stack.compiler.address).returncode == 0

    with stack.client(acme) as client:
        tokens = list(range(30))
        assert reason(lambda: client.generate(tokens, max_new_tokens=60).wait()) == "QUOTA_EXCEEDED"
        assert reason(lambda: list(client.list_builds())) == "PERMISSION_DENIED"
        assert reason(client.unload_engine) == "PERMISSION_DENIED"
    unauthenticated = [("UNAUTHENTICATED", "UNAUTHENTICATED")] * 2
    assert refusals(stack, "") == unauthenticated
    assert refusals(stack, f"{ops[:-2]}xx") == unauthenticated
    assert refusals(stack, ops, stack.others) == [("UNAVAILABLE", "UNREACHABLE")] * 2
    assert stack.run("", "keys", "revoke", acme, "--file", str(stack.keys)).returncode == 0
    assert reason(lambda: asked_for(stack, acme, 60)) == "UNAUTHENTICATED"

    logs = json.dumps([*stack.compiler.lines, *stack.runtime.lines])
    assert '"tenant": "acme"' in logs
    assert PROMPT not in logs
    assert all(key.split("_", 2)[2] not in logs for key in (ops, acme))


@pytest.mark.parametrize("module", ["compiler_service", "runtime_service"])
def test_daemon_that_cannot_be_secured_does_not_start(
    module: str, stack: Stack, tmp_path: Path
) -> None:
    """One line and exit code 2, whichever daemon it is."""
    make_certs(tmp_path, (), "client", 2)
    let_expire(tmp_path / "server.crt", tmp_path)
    certs, others = stack.certs, stack.others
    for flags, problem in (
        (("--listen", "0.0.0.0:0"), "--insecure"),
        (("--tls-cert", f"{certs}/server.crt", "--tls-key", f"{others}/server.key"), "mismatch"),
        (
            ("--tls-cert", f"{tmp_path}/server.crt", "--tls-key", f"{tmp_path}/server.key"),
            "expired",
        ),
        (("--api-keys", f"{tmp_path}/none.json"), "cannot read API keys"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", module, "--store", str(tmp_path / "store"),
             "--metrics-listen", "", *flags],
            capture_output=True, text=True, timeout=60, env={**ENVIRON, "HOME": str(tmp_path)},
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        assert problem in done.stderr.splitlines()[-1]
