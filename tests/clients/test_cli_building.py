"""`millrace build` and `builds`: stages, recipes, tables, exit codes."""

import json
import os
from pathlib import Path

import pytest
from millrace.cli.building import Speed, parse_quant
from millrace.cli.listing import recipe_text
from millrace.compiler.v1 import compiler_pb2

from runtime_service.settings import quant_named
from shared.engine import QuantConfig
from shared.errors import InvalidModel, to_status
from tests.clients.command import millrace, on_a_terminal
from tests.clients.scripted_daemon import (
    DIGEST,
    Script,
    ScriptedDaemon,
    a_build,
    an_operation,
    running,
    succeeded,
)


def test_build_tells_its_stages_and_its_engine(daemon: ScriptedDaemon, script: Script) -> None:
    script.changes = [running(0.1, "import"), running(0.5, "quantize"), succeeded()]
    done = millrace(daemon, "build", "sample:tiny", "--arch", "cpu,sm_90", "--quant", "int4-g128")
    assert done.returncode == 0
    assert done.stdout.startswith(f"engines/{DIGEST[:12]}  cpu  int8  built in ")
    assert done.stderr.splitlines() == ["cpu:  10% import", "cpu:  50% quantize", "cpu: succeeded"]
    asked = script.asked[0]
    assert (list(asked.archs), asked.quant.scheme, asked.quant.group_size) == (
        ["cpu", "sm_90"], "int4", 128,
    )  # fmt: skip


def test_build_says_that_an_engine_was_there(daemon: ScriptedDaemon) -> None:
    assert "was in the store" in millrace(daemon, "build", "sample:tiny").stdout


def test_build_gives_programs_a_line_per_change(daemon: ScriptedDaemon, script: Script) -> None:
    script.changes = [running(0.5, "quantize"), succeeded()]
    done = millrace(daemon, "build", "sample:tiny", "--json")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    states = [line["builds"][0]["state"] for line in lines]
    assert states == ["BUILD_STATE_RUNNING", "BUILD_STATE_SUCCEEDED"]
    assert done.stderr == ""


def test_build_detaches(daemon: ScriptedDaemon, script: Script) -> None:
    script.changes = [an_operation(a_build(compiler_pb2.BUILD_STATE_QUEUED))]
    done = millrace(daemon, "build", "sample:tiny", "--detach")
    assert done.stdout == f"builds/{DIGEST}  cpu  queued\n"
    assert len(script.asked) == 1


def test_failed_build_exits_with_the_code_of_its_reason(
    daemon: ScriptedDaemon, script: Script
) -> None:
    error = to_status(InvalidModel(problem="shard 2 is missing"))
    script.changes = [an_operation(a_build(compiler_pb2.BUILD_STATE_FAILED, error=error))]
    done = millrace(daemon, "build", "sample:tiny")
    assert done.returncode == 2
    assert "millrace: The checkpoint cannot be used: shard 2 is missing." in done.stderr


def test_build_draws_a_bar_with_percent_speed_and_time_left(
    daemon: ScriptedDaemon, script: Script
) -> None:
    script.changes = [running(0.5, "quantize", done) for done in (0, 30_000_000, 60_000_000)]
    script.changes.append(succeeded())
    shown = on_a_terminal(daemon, "build", "sample:tiny")
    for part in ("int8 for cpu", "quantize", "50%", "MB/s", "7 s left", "100%", "\033["):
        assert part in shown
    assert "built in" in shown


def test_builds_are_a_plain_table_without_a_terminal(
    daemon: ScriptedDaemon, script: Script
) -> None:
    script.builds = [running(0.25, "quantize").builds[0], a_build(compiler_pb2.BUILD_STATE_QUEUED)]
    done = millrace(daemon, "builds")
    header, first, second = done.stdout.splitlines()
    assert header.split() == ["BUILD", "MODEL", "ARCH", "QUANT", "STATE", "DONE", "ASKED"]
    assert "running  25% quantize" in first
    assert "queued" in second
    assert "\033[" not in done.stdout


def test_build_asks_for_the_whole_recipe(
    daemon: ScriptedDaemon, script: Script, tmp_path: Path
) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("words")
    script.changes = [succeeded()]
    done = millrace(
        daemon, "build", "sample:tiny", "-q", "int4-gptq-g32", "--keep", "lm_head, layers.0.*=bf16",
        "--calibration", os.path.relpath(text), "--calibration-tokens", "512", "--max-kl", "0.2",
        "--max-perplexity-increase", "0.1", "--auto-keep",
        "--kv-cache", "int8", "--probe-tokens", "4096", "--no-act-order",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    asked = script.asked[0]
    assert asked.calibration_uri == str(text)
    quant = asked.quant
    assert (quant.scheme, quant.group_size, list(quant.keep)) == (
        "int4-gptq", 32, ["lm_head", "layers.0.*"],
    )  # fmt: skip
    assert (quant.calibration_tokens, quant.max_kl, quant.max_perplexity_increase) == (
        512,
        0.2,
        0.1,
    )
    assert (quant.auto_keep, quant.skip_quality, quant.kv_cache) == (True, False, "int8")
    assert (quant.probe_tokens, quant.no_act_order) == (4096, True)
    assert recipe_text(quant).startswith("int4-gptq-g32-kv-int8, keeps lm_head")


@pytest.mark.parametrize(
    ("option", "value", "what"),
    [
        ("--keep", "lm_head=int8", "stays in bf16"),
        ("--keep", " ,", "names no weight"),
        ("--quant", "int4-gx", "not of the form"),
        ("--quant", "int4-g0", "not of the form"),
    ],
)
def test_recipe_that_is_not_one_is_wrong_usage(
    daemon: ScriptedDaemon, option: str, value: str, what: str
) -> None:
    done = millrace(daemon, "build", "sample:tiny", option, value)
    assert (done.returncode, done.stdout) == (2, "")
    assert what in done.stderr


@pytest.mark.parametrize(
    ("text", "expected"),
    [("int8", ("int8", 0, "")), ("int4-gptq", ("int4-gptq", 0, "")),
     ("int4-gptq-g32", ("int4-gptq", 32, "")), ("int4-g128", ("int4", 128, "")), ("", ("", 0, "")),
     ("bf16-kv-fp8", ("bf16", 0, "fp8")), ("int4-gptq-g32-kv-int8", ("int4-gptq", 32, "int8"))],
)  # fmt: skip
def test_quantization_is_read_as_it_is_written(text: str, expected: tuple[str, int, str]) -> None:
    assert parse_quant(text) == expected
    if text:
        scheme, group, kv_cache = expected
        named = QuantConfig(scheme, group, kv_cache=kv_cache)
        assert quant_named(text) == named
        assert quant_named(str(named)) == named


@pytest.mark.parametrize("command", ["build", "builds", "top"])
def test_a_build_without_a_known_end_shows_how_far_it_has_read(
    daemon: ScriptedDaemon, script: Script, command: str
) -> None:
    """The search for layers to keep stands at one percent, and reads the checkpoint again and again."""
    searches = running(0.9, "quality", 40_000_000)
    searches.builds[0].progress.ClearField("eta")
    script.builds, script.changes = list(searches.builds), [searches, succeeded()]
    asked = (command, "sample:tiny") if command == "build" else (command,)
    assert "40% read" in on_a_terminal(daemon, *asked, until="40% read" if command == "top" else "")


def test_speed_is_of_the_running_stage() -> None:
    speed = Speed()
    assert speed.update("import", 0, 0.0) == 0.0
    assert speed.update("import", 10_000_000, 1.0) == 10_000_000
    assert speed.update("quantize", 0, 1.5) == 0.0
    assert speed.update("quantize", 5_000_000, 2.0) == 10_000_000
    assert speed.update("quantize", 0, 2.5) == 0.0, "the checkpoint is read once more"
    assert speed.update("quantize", 4_000_000, 3.0) == 8_000_000
