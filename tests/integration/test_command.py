"""The `millrace` command with the real stack: up, and everything that one types next."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.checkpoints import write_checkpoint

pytestmark = pytest.mark.redis

COMMAND = (sys.executable, "-m", "millrace.cli")
ENVIRON = {
    **{name: value for name, value in os.environ.items() if not name.startswith("MILLRACE_")},
    "OMP_NUM_THREADS": "1",
}
FREE_PORTS = (
    "--compiler", "127.0.0.1:0", "--runtime", "127.0.0.1:0", "--gateway", "127.0.0.1:0",
    "--no-metrics",
)  # fmt: skip


class Up:
    """A running `millrace up`, ready."""

    def __init__(self, state: Path, *flags: str) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, "up", "--json", "--state", str(state), *FREE_PORTS, *flags],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRON,
        )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        self.addresses: dict[str, str] = json.loads(line)
        self.children = psutil.Process(self.process.pid).children(recursive=True)

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Another command, against this stack."""
        variables = {f"MILLRACE_CLI_{k.upper()}": v for k, v in self.addresses.items()}
        return subprocess.run(
            [*COMMAND, *arguments],
            capture_output=True, text=True, timeout=120, env={**ENVIRON, **variables},
        )  # fmt: skip

    def json(self, *arguments: str) -> Any:
        """The object that a command prints for programs."""
        done = self.run(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def end(self, number: signal.Signals) -> tuple[int, str]:
        """Exit code and what was said on stderr, after that signal."""
        self.process.send_signal(number)
        _, said = self.process.communicate(timeout=60)
        return self.process.returncode, said

    def close(self) -> None:
        """Ends what is left; its children end with it."""
        self.process.kill()
        self.process.wait()


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Up]:
    """A stack that serves a tiny model."""
    checkpoint = write_checkpoint(tmp_path / "tiny", "llama")
    up = Up(tmp_path / "state", "--model", str(checkpoint), "--quant", "fp32")
    yield up
    up.close()


def test_what_a_newcomer_types(stack: Up, tmp_path: Path) -> None:
    """One stack for all of it: starting one costs seconds."""
    (engine,) = stack.json("engines")["engines"]
    assert (engine["model"], engine["key"]["arch"]) == ("tiny", "cpu")
    assert stack.json("builds")["builds"][0]["state"] == "BUILD_STATE_SUCCEEDED"

    answers = [stack.json("generate", "hello", "-m", "8", "--ignore-end") for _ in range(2)]
    assert answers[0]["generated_tokens"] == 8
    assert answers[0]["text"] == answers[1]["text"]

    shown = stack.run("inspect", "tiny", "--graph")
    assert shown.returncode == 0
    assert "before (graph.source.json)" in shown.stdout
    assert "qkv_rope_write" in shown.stdout

    again = stack.run("build", str(tmp_path / "tiny"), "--arch", "cpu", "--quant", "fp32")
    assert "was in the store" in again.stdout
    assert stack.run("load", "tiny").stdout == "serving tiny  cpu  fp32\n"

    load = ("-c", "3", "--calls", "2", "--requests", "6", "--in", "5", "--out", "4")
    measured = json.loads(stack.run("bench", "serve", *load, "--json", "-").stdout)
    assert (measured["requests"]["finished"], measured["output_tokens"]) == (6, 24)
    findings = {f["subject"]: f["verdict"] for f in stack.json("doctor")["findings"]}
    assert (findings["compile daemon"], findings["runtime daemon"]) == ("ok", "ok")

    assert stack.run("generate", "hello " * 5000).returncode == 2
    assert stack.run("inspect", "beefbeef").returncode == 3

    state = tmp_path / "state"
    second = subprocess.run(
        [*COMMAND, "up", "--state", str(state)], capture_output=True, text=True, env=ENVIRON
    )
    assert (second.returncode, second.stdout) == (1, "")
    assert f"another Millrace runs in {state}" in second.stderr

    taken = stack.addresses["compiler"]
    third = subprocess.run(
        [*COMMAND, "up", "--state", str(tmp_path / "other"), "--compiler", taken],
        capture_output=True, text=True, env=ENVIRON,
    )  # fmt: skip
    assert third.returncode == 1
    assert f"cannot listen on {taken}" in third.stderr

    code, said = stack.end(signal.SIGINT)
    assert (code, said.splitlines()[-1]) == (0, "stopped")
    assert [child for child in stack.children if child.is_running()] == []


def test_quantization_proves_itself_from_the_command_line(tmp_path: Path) -> None:
    """A build beyond its limits fails and says how it passes; with --auto-keep it does so itself."""
    checkpoint = write_checkpoint(tmp_path / "tiny", "llama")
    text = tmp_path / "mine.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"line {n} of a text\n"}) for n in range(90)))
    up = Up(tmp_path / "state")
    try:
        limits = ("--max-kl", "0.05", "--max-perplexity-increase", "9", "--calibration", str(text))
        asked = ("build", str(checkpoint), "--arch", "cpu", "--quant", "int4-gptq", *limits)
        failed = up.run(*asked)
        assert (failed.returncode, failed.stdout) == (1, "")
        found = re.search(
            r"beyond 0.05; --keep (\S+) passes; worst layers: layers\.", failed.stderr
        )
        assert found, failed.stderr
        proposed = found[1]
        assert up.run("engines").stdout == ""

        assert up.run(*asked, "--keep", proposed).returncode == 0
        assert up.run("delete", "tiny").returncode == 0
        assert up.run(*asked, "--auto-keep").returncode == 0
        report = up.json("inspect", "tiny", "--quality")
        assert report["kl"]["mean"] <= 0.05
        assert ",".join(report["auto_kept"]) == proposed
        (engine,) = up.json("engines")["engines"]
        assert engine["key"]["quant"]["calibration_digest"] == report["text_digest"]
        assert engine["key"]["quant"]["calibration_tokens"] == 4096
        shown = up.run("inspect", "tiny")
        assert "int4-gptq-g64, keeps what its limits need, KL at most 0.05" in shown.stdout

        text.write_text(json.dumps("too short"))
        refused = up.run(*asked)
        assert refused.returncode in (1, 2)
        assert "tokens, and at least 513 are needed" in refused.stderr
    finally:
        up.close()


def test_several_runtimes_come_with_a_gateway(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "tiny", "llama")
    flags = ("--model", str(checkpoint), "--quant", "fp32", "--runtimes", "2")
    up = Up(tmp_path / "state", *flags)
    try:
        fleet = up.json("status")
        (deployment,) = fleet["deployments"]
        assert (deployment["name"], deployment["ready_replicas"]) == ("local", 2)
        front, first = up.addresses["gateway"], up.addresses["runtime"]
        assert first in [runtime["address"] for runtime in fleet["runtimes"]]
        for address in (front, first):
            asked = ("generate", "hello", "-m", "8", "--ignore-end", "--runtime", address)
            assert up.json(*asked)["generated_tokens"] == 8
        refused = up.run("load", "tiny", "--runtime", front)
        assert "millrace deploy" in refused.stderr
        assert up.run("undeploy", "local").returncode == 0
    finally:
        up.close()


def test_a_daemon_that_dies_is_reported_and_takes_the_stack_with_it(tmp_path: Path) -> None:
    up = Up(tmp_path / "state")
    (compiler,) = (child for child in up.children if "compiler_service" in child.cmdline())
    compiler.kill()
    _, said = up.process.communicate(timeout=60)
    assert up.process.returncode == 1
    assert "the compile daemon ended (SIGKILL); its last lines" in said
    assert "server_started" in said
    # What the killed one had started ends by itself, and nobody waits for it.
    _, alive = psutil.wait_procs(up.children, timeout=30)
    assert alive == []


def test_the_stack_ends_with_its_command_however_that_ends(tmp_path: Path) -> None:
    up = Up(tmp_path / "state")
    up.close()
    _, alive = psutil.wait_procs(up.children, timeout=30)
    assert alive == []
