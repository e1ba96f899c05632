"""The `millrace` command as its users meet it: help, usage, exit codes, what a terminal shows."""

import json
import os
import re
import resource
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer
from millrace.cli.app import app
from millrace.cli.output import bytes_text, duration_text, fitting, indented

from tests.clients.command import COMMAND, millrace, on_a_terminal
from tests.clients.scripted_daemon import (
    DIGEST,
    GRAPH,
    WORDS,
    Script,
    ScriptedDaemon,
    an_engine,
)

COMMANDS = (
    "up", "build", "builds", "cancel", "engines", "inspect", "load", "generate", "chat", "bench",
    "deploy", "undeploy", "status", "top", "doctor", "health", "certs", "keys", "sign", "store",
    "tune", "demo", "delete", "completion",
)  # fmt: skip


def without_colours(shown: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", shown)


def test_help_is_quick() -> None:
    """In seconds of CPU, which a busy machine does not stretch."""

    def children_s() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    spent = []
    for _ in range(3):
        before = children_s()
        assert "Exit codes: 0 done" in millrace(None, "--help").stdout
        spent.append(children_s() - before)
    assert min(spent) < 0.4


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    done = millrace(None, command, "--help")
    assert done.returncode == 0
    assert f"Example: millrace {command}" in " ".join(done.stdout.split())


@pytest.mark.parametrize("command", ["", *COMMANDS, "bench serve", "keys create", "keys list"])
def test_help_is_whole_in_80_columns(command: str) -> None:
    """No name is broken at its hyphen, and no sentence is cut short."""
    done = millrace(None, *command.split(), "--help", columns=80)
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    assert max(map(len, lines)) <= 80
    assert [line for line in lines if line.endswith("-")] == []
    summaries = lines[lines.index("Commands:") :] if "Commands:" in lines else []
    assert [line for line in summaries if line.endswith("...")] == []


def test_help_names_every_command() -> None:
    listed = re.findall(r"^  (\w+)  ", millrace(None, "--help").stdout, re.M)
    assert set(listed) == set(COMMANDS)


def test_version_is_that_of_the_package() -> None:
    assert millrace(None, "--version").stdout == f"millrace {version('millrace-server')}\n"


def test_wrong_usage_exits_with_2_and_says_what_was_meant() -> None:
    done = millrace(None, "bild")
    assert (done.returncode, done.stdout) == (2, "")
    assert "Did you mean 'build'" in done.stderr


def test_no_daemon_exits_with_4_in_one_line() -> None:
    done = millrace(None, "builds", "--compiler", "127.0.0.1:1")
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith("start one with: millrace up\n")


def test_failures_are_json_for_programs() -> None:
    done = millrace(None, "builds", "--json", "--compiler", "127.0.0.1:1")
    assert json.loads(done.stderr)["error"]["reason"] == "UNREACHABLE"


@pytest.mark.parametrize(("file", "is_json"), [("figures.json", False), ("-", True)])
def test_bench_tells_failures_as_it_tells_results(file: str, is_json: bool) -> None:
    """Its --json names a file: only where that is stdout a program reads along."""
    done = millrace(None, "bench", "serve", "--json", file, "--runtime", "127.0.0.1:1")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (4, "", 1)
    assert done.stderr.startswith('{"error": ' if is_json else "millrace: No daemon answers")


def test_empty_lists_say_what_to_type(daemon: ScriptedDaemon) -> None:
    done = millrace(daemon, "engines")
    assert (done.returncode, done.stdout) == (0, "")
    assert "millrace build sample:smollm2-135m" in done.stderr


def test_whole_names_fit_into_80_columns_of_a_terminal(
    daemon: ScriptedDaemon, script: Script
) -> None:
    """A digest in two parts can be neither read nor copied."""
    layers = {"graph.json": GRAPH, "graph.source.json": GRAPH}
    script.engines = [an_engine(script.blobs, layers)]
    shown = on_a_terminal(daemon, "inspect", "tiny", columns=80)
    lines = [line.rstrip() for line in without_colours(shown).splitlines()]
    assert f"  engines/{DIGEST}" in lines
    assert any(line.startswith("model ") for line in lines)
    assert max(map(len, lines)) <= 80


def test_every_command_is_listed_with_its_kind(daemon: ScriptedDaemon) -> None:
    shown = without_colours(on_a_terminal(daemon, "--help", columns=80))
    assert "─ Engines ─" in shown
    assert "─ Commands ─" not in shown


def test_doctor_finds_daemons_and_names_the_fix(daemon: ScriptedDaemon, tmp_path: Path) -> None:
    done = millrace(daemon, "doctor", "--state", str(tmp_path), "--json")
    findings = {row["subject"]: row for row in json.loads(done.stdout)["findings"]}
    assert findings["runtime daemon"]["found"] == f"serves at {daemon.address}"
    assert findings["torch"]["verdict"] == "ok"
    away = millrace(
        None, "doctor", "--runtime", "127.0.0.1:1", "--redis-url", "redis://127.0.0.1:1"
    )
    assert away.returncode == 1
    assert "BAD   Redis" in away.stdout
    assert re.search(
        r"note  runtime daemon  none answers at 127.0.0.1:1 -> millrace up", away.stdout
    )


def test_health_is_an_exit_code(daemon: ScriptedDaemon) -> None:
    assert millrace(None, "health", daemon.address).returncode == 0
    shown = millrace(None, "health", daemon.address, "--json").stdout
    assert json.loads(shown) == {"address": daemon.address, "is_serving": True}
    assert millrace(None, "health", "127.0.0.1:1").returncode == 4


def test_long_lines_go_on_further_in_between_words() -> None:
    text = "  x, y = attention(q, kv) {head_dim=64} [layers.0.qkv]"
    first, *rest = indented(text, 24).splitlines()
    assert first.startswith("  x, y = ")
    assert rest
    assert all(line.startswith("      ") and len(line) <= 24 for line in rest)
    assert " ".join((first, *rest)).split() == text.split()
    assert indented(text, 100) == text


@pytest.mark.parametrize(
    ("size", "text"), [(7, "7 B"), (1234, "1.2 kB"), (134_500_000, "134 MB"), (5e12, "5.0 TB")]
)
def test_sizes_are_short(size: float, text: str) -> None:
    assert bytes_text(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.417, "0.42 s"), (42.4, "42 s"), (187, "3:07"), (3723, "1:02:03")]
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_every_command_speaks_to_programs_but_those_for_people() -> None:
    for_people = {"chat", "completion", "demo", "top"}
    commands: dict[str, Any] = vars(typer.main.get_command(app))["commands"]
    silent = {
        name
        for name, command in commands.items()
        for leaf in vars(command).get("commands", {name: command}).values()
        if not any("--json" in parameter.opts for parameter in leaf.params)
    }
    assert silent == for_people


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script_asks_the_command(shell: str) -> None:
    script = millrace(None, "completion", shell).stdout
    assert f"_MILLRACE_COMPLETE=complete_{shell}" in script


def test_shell_completes_commands_and_options() -> None:
    def completed(words: str) -> list[str]:
        environ = {**os.environ, "_MILLRACE_COMPLETE": "complete_bash", "COMP_WORDS": words,
                   "COMP_CWORD": str(len(words.split()) - 1)}  # fmt: skip
        done = subprocess.run(COMMAND, capture_output=True, text=True, timeout=60, env=environ)
        return done.stdout.split()

    assert completed("millrace en") == ["engines"]
    assert completed("millrace build --ar") == ["--arch"]


def test_terminal_shows_what_is_waited_for(daemon: ScriptedDaemon) -> None:
    shown = on_a_terminal(daemon, "generate", "hi", "--runtime", daemon.address)
    assert shown.index("waiting for the first token") < shown.index(WORDS[0].strip())


@pytest.mark.parametrize(
    ("width", "shown"), [(21, [0, 1, 2]), (20, [0, 2]), (14, [0, 2]), (13, [0])]
)
def test_narrow_terminal_gets_fewer_columns_and_whole_cells(width: int, shown: list[int]) -> None:
    columns, rows = ("name", "start", "state"), [("runtime", "1 s", "idle")]
    assert fitting(columns, rows, ("start", "state"), width) == shown


def test_narrow_column_takes_the_room_that_a_wide_one_leaves() -> None:
    columns, rows = ("name", "KV", "TTFT"), [("runtime", "75% of 1024", "9 ms")]
    assert fitting(columns, rows, ("TTFT", "KV"), 14) == [0, 2]
