"""The `millrace` command as its users meet it: a process, its output and its exit code."""

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
from google.protobuf.duration_pb2 import Duration
from millrace.cli.app import app
from millrace.cli.building import Speed, parse_quant
from millrace.cli.inspecting import graph_text
from millrace.cli.listing import recipe_text
from millrace.cli.output import bytes_text, duration_text, fitting, indented
from millrace.compiler.v1 import compiler_pb2

from runtime_service.settings import quant_named
from shared.engine import QuantConfig
from shared.errors import Draining, InvalidModel, QueueFull, to_status
from tests.clients.command import COMMAND, millrace, on_a_terminal
from tests.clients.scripted_daemon import (
    DIGEST,
    WORDS,
    Script,
    ScriptedDaemon,
    a_build,
    an_engine,
    an_operation,
    running,
    succeeded,
)

COMMANDS = (
    "up", "build", "builds", "cancel", "engines", "inspect", "load", "generate", "chat", "bench",
    "deploy", "undeploy", "status", "top", "doctor", "health", "certs", "keys", "sign", "store",
    "tune", "demo", "delete", "completion",
)  # fmt: skip
GRAPH = {
    "inputs": {"token_ids": {"dims": ["T"], "dtype": "int32"}},
    "nodes": [
        {"op": "embedding", "inputs": ["token_ids"], "outputs": ["x"], "weights": {"weight": "e"},
         "attrs": {"dtype": "float32"}},
        *(
            {"op": op, "inputs": [f"{op}.{i}.in"], "outputs": [f"{op}.{i}"], "weights": {},
             "attrs": {"layer": i}}
            for i in range(30)
            for op in ("rms_norm", "linear", "attention")
        ),
    ],
    "outputs": ["logits"],
    "weights": {"e": {"layout": "plain"}},
    "config": {"family": "llama", "num_layers": 30,
               "checkpoint_quantization": ["Q4_1: 210 tensors kept exactly as int4_group 32"]},
}  # fmt: skip


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


def test_prompt_that_speaks_of_json_is_no_wish_for_it(daemon: ScriptedDaemon) -> None:
    done = millrace(daemon, "generate", "--runtime", "127.0.0.1:1", "--", "--json")
    assert done.stderr.startswith("millrace: No daemon answers")


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
    for part in ("int8 for cpu", "quantize", "50%", "MB/s", "7.00 s left", "100%", "\033["):
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


def test_empty_lists_say_what_to_type(daemon: ScriptedDaemon) -> None:
    done = millrace(daemon, "engines")
    assert (done.returncode, done.stdout) == (0, "")
    assert "millrace build sample:smollm2-135m" in done.stderr


def test_engines_and_cancel(daemon: ScriptedDaemon, script: Script) -> None:
    script.engines = [an_engine(script.blobs, {"graph.json": GRAPH})]
    script.builds = [a_build(compiler_pb2.BUILD_STATE_QUEUED)]
    assert json.loads(millrace(daemon, "engines", "--json").stdout)["engines"][0]["model"] == "tiny"
    assert millrace(daemon, "cancel", DIGEST[:8]).stdout == f"{DIGEST[:12]}  cancelled\n"
    assert millrace(daemon, "cancel", "ffff").returncode == 3


def test_inspect_shows_key_layers_graph_kernels_and_times(
    daemon: ScriptedDaemon, script: Script
) -> None:
    kernel = {"code": [0, 2000]}
    index = {"arch": "sm_90", "min_driver": [12, 0],
             "kernels": {"linear.gemv.0a": kernel, "linear.gemv.0b": kernel}}  # fmt: skip
    layers = {"graph.json": GRAPH, "graph.source.json": GRAPH, "kernels/index.json": index}
    script.engines = [an_engine(script.blobs, layers)]
    timing = compiler_pb2.StageTiming(stage="quantize", duration=Duration(seconds=4))
    script.builds = [a_build(compiler_pb2.BUILD_STATE_SUCCEEDED, stage_timings=[timing])]
    done = millrace(daemon, "inspect", DIGEST[:8], "--graph")
    assert done.returncode == 0
    for part in ("cd" * 32, "llama: 30 layers", "91 nodes -> 91 nodes", "30 attention",
                 "2 for sm_90, 4.0 kB, driver for CUDA 12.0", "quantize 4.00 s", "before (",
                 "30 times:", "1 plain", "Q4_1: 210 tensors kept exactly",
                 "signed by     nobody", "tuned on      nothing"):  # fmt: skip
        assert part in done.stdout, part


QUALITY = {
    "measured_tokens": 512, "kl": {"mean": 0.0123, "p99": 0.2}, "top1_agreement": 0.95,
    "perplexity": {"unquantized": 20.0, "quantized": 20.5, "increase": 0.025},
    "limits": {"max_kl": 0.05, "max_perplexity_increase": 0.05},
    "weights": [
        {"weight": "layers.0.qkv", "layout": "int8_channel", "error": 0.01, "impact": 0.0025, "drift": 0.02},
        {"weight": "layers.0.down", "layout": "int8_channel", "error": 0.02, "impact": 0.005, "drift": 0.03},
        {"weight": "layers.1.qkv", "layout": "int8_channel", "error": 0.005, "impact": 0.02, "drift": 0.04},
        {"weight": "lm_head", "layout": "plain", "error": 0.0, "impact": 0.0, "drift": 0.05},
    ],
    "worst": ["layers.1.qkv", "layers.0.down", "layers.0.qkv"],
    "needle": {"is_applicable": True, "num_scored": 2, "num_retrieved": 1, "contexts": [
        {"tokens": 256, "skipped": "the facts and questions alone have 300 tokens", "needles": []},
        {"tokens": 512, "skipped": "", "needles": [
            {"depth": 0.1, "unquantized": True, "quantized": True},
            {"depth": 0.5, "unquantized": False, "quantized": True},
            {"depth": 0.9, "unquantized": True, "quantized": False},
        ]},
    ]},
    "kept": ["lm_head"], "auto_kept": [],
}  # fmt: skip


def test_inspect_chooses_among_a_models_engines_by_quant(
    daemon: ScriptedDaemon, script: Script
) -> None:
    layers = {"graph.json": GRAPH, "graph.source.json": GRAPH, "quality.json": QUALITY}
    script.engines = [an_engine(script.blobs, layers), an_engine(script.blobs, layers)]
    script.engines[0].name = f"engines/{'ef' * 32}"
    script.engines[0].key.quant.scheme = "int4-rtn"
    unclear = millrace(daemon, "inspect", "tiny")
    assert "several engines (cpu int4-rtn, cpu int8); say which by --quant" in unclear.stderr
    for wanted in ((), ("--quality",)):
        done = millrace(daemon, "inspect", "tiny", "--quant", "int8", *wanted)
        assert (done.returncode, done.stderr) == (0, "")
        assert f"engines/{DIGEST}" in done.stdout


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


def test_inspect_shows_what_quantizing_cost(daemon: ScriptedDaemon, script: Script) -> None:
    script.engines = [an_engine(script.blobs, {"graph.json": GRAPH, "quality.json": QUALITY})]
    done = millrace(daemon, "inspect", DIGEST[:8], "--quality")
    assert done.returncode == 0
    for part in ("0.0123 nats a token", "95.0%", "20.000 -> 20.500 (+2.50%, allowed +5.00%)",
                 "1 retrieved of the 2 that the unquantized model retrieves", "lm_head",
                 "skipped: the facts and questions alone have 300 tokens"):  # fmt: skip
        assert part in done.stdout, part
    (header,) = (line for line in done.stdout.splitlines() if line.startswith("NEEDLES IN"))
    (row,) = (line for line in done.stdout.splitlines() if line.startswith("512 tokens"))
    assert re.split("  +", header) == ["NEEDLES IN", "10% DEEP", "50% DEEP", "90% DEEP"]
    assert re.split("  +", row) == ["512 tokens", "found", "not scored", "LOST"]
    lines = done.stdout.splitlines()
    worst = [line.split()[0] for line in lines if "int8_channel" in line]
    assert worst == QUALITY["worst"]
    title = "each layer's largest impact, by which weights are ranked, and its error:"
    plot = lines[lines.index(title) + 1 :]
    bars = {line.split()[0]: line.count("█") for line in plot}
    assert bars == {"layers.0": 10, "layers.1": 40, "lm_head": 0}
    told = [re.split(r"[ █]{2,}", line)[-3:] for line in plot[:2]]
    assert told == [["0.50%", "2.00%", "down"], ["2.00%", "0.50%", "qkv"]]
    assert max(map(len, plot)) <= 80
    shown = millrace(daemon, "inspect", DIGEST[:8], "--quality", "--json")
    assert json.loads(shown.stdout) == QUALITY


def test_inspect_says_that_nothing_was_measured(daemon: ScriptedDaemon, script: Script) -> None:
    script.engines = [an_engine(script.blobs, {"graph.json": GRAPH})]
    done = millrace(daemon, "inspect", DIGEST[:8], "--quality")
    assert (done.returncode, done.stdout) == (3, "")
    assert "has no quality report" in done.stderr


def test_inspect_points_to_json_for_a_report_of_an_older_form(
    daemon: ScriptedDaemon, script: Script
) -> None:
    older = {**QUALITY, "needle": {"is_applicable": True, "depths": []}}
    script.engines = [an_engine(script.blobs, {"graph.json": GRAPH, "quality.json": older})]
    done = millrace(daemon, "inspect", DIGEST[:8], "--quality")
    assert (done.returncode, done.stdout) == (1, "")
    assert "see it with --json" in done.stderr
    shown = millrace(daemon, "inspect", DIGEST[:8], "--quality", "--json")
    assert json.loads(shown.stdout) == older


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
    [("--keep", "lm_head=int8", "stays in bf16"), ("--quant", "int4-gx", "not of the form")],
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


def test_inspect_of_nothing_exits_with_3(daemon: ScriptedDaemon) -> None:
    done = millrace(daemon, "inspect", "beefbeef")
    assert (done.returncode, done.stdout) == (3, "")
    assert "No engine" in done.stderr


def test_load_finds_an_engine_by_model_name(daemon: ScriptedDaemon, script: Script) -> None:
    script.engines = [an_engine(script.blobs, {"graph.json": GRAPH})]
    done = millrace(daemon, "load", "tiny")
    assert done.stdout == "serving tiny  cpu  int8\n"
    assert "loaded in 4.00 s: copy_weights 2.50 s, import 1.50 s\n" in done.stderr
    assert script.asked[-1].selector.arch == "cpu"
    assert millrace(daemon, "load", "tiny", "--quant", "int4").returncode == 3


def test_generate_streams_to_stdout_and_tells_its_speed_on_stderr(daemon: ScriptedDaemon) -> None:
    done = millrace(daemon, "generate", "hello")
    assert done.stdout == "".join((*WORDS * 52, "\n"))[: len(done.stdout) - 1] + "\n"
    assert re.search(r"first token \d+ ms, [\d.]+ tokens/s, 3 prompt \+ 256 tokens", done.stderr)


def test_generate_reads_stdin_and_gives_programs_one_object(
    daemon: ScriptedDaemon, script: Script
) -> None:
    done = millrace(
        daemon, "generate", "-", "--json", "-m", "5", "-t", "0.5", "--seed", "9", stdin="from stdin"
    )
    answer = json.loads(done.stdout)
    assert (answer["text"], answer["seed"]) == ("".join(WORDS), 9)
    assert answer["samples"][0]["finish_reason"] == "length"
    assert script.asked[0].text == "from stdin"
    assert script.asked[0].sampling.temperature == 0.5


def test_refused_generation_exits_with_4_when_retrying_may_help(
    daemon: ScriptedDaemon, script: Script
) -> None:
    script.failures = [QueueFull(retry_after_s=60, waiting_tokens=9, max_waiting_tokens=8)]
    done = millrace(daemon, "generate", "hello")
    assert (done.returncode, done.stdout) == (4, "")
    script.failures = [Draining(retry_after_s=60)]
    assert millrace(daemon, "generate", "hello").returncode == 4


def test_refused_input_exits_with_2(daemon: ScriptedDaemon) -> None:
    done = millrace(daemon, "generate", "")
    assert (done.returncode, done.stderr) == (2, "millrace: prompt: is empty.\n")


def test_interrupt_exits_with_130_and_cancels(daemon: ScriptedDaemon, script: Script) -> None:
    script.blocks_after = 1
    process = subprocess.Popen(
        [*COMMAND, "generate", "hello", "--runtime", daemon.address],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.read(4) == b"Once"
    process.send_signal(2)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, b"")
    assert script.cancelled.wait(60)


def test_chat_keeps_the_conversation(daemon: ScriptedDaemon, script: Script) -> None:
    script.engines = [an_engine(script.blobs, {"graph.json": GRAPH})]
    said = "hello\nand then?\n/reset\nagain\n"
    done = millrace(daemon, "chat", "--system", "Be brief.", "-m", "5", stdin=said)
    assert done.returncode == 0
    chats = [[m.content for m in asked.chat.messages] for asked in script.asked]
    answer = "".join(WORDS)
    assert chats == [
        ["Be brief.", "hello"],
        ["Be brief.", "hello", answer, "and then?"],
        ["Be brief.", "again"],
    ]


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


def test_speed_is_of_the_running_stage() -> None:
    speed = Speed()
    assert speed.update("import", 0, 0.0) == 0.0
    assert speed.update("import", 10_000_000, 1.0) == 10_000_000
    assert speed.update("quantize", 0, 1.5) == 0.0
    assert speed.update("quantize", 5_000_000, 2.0) == 10_000_000
    assert speed.update("quantize", 0, 2.5) == 0.0, "the checkpoint is read once more"
    assert speed.update("quantize", 4_000_000, 3.0) == 8_000_000


def test_long_lines_go_on_further_in_between_words() -> None:
    text = "  x, y = attention(q, kv) {head_dim=64} [layers.0.qkv]"
    first, *rest = indented(text, 24).splitlines()
    assert first.startswith("  x, y = ")
    assert rest
    assert all(line.startswith("      ") and len(line) <= 24 for line in rest)
    assert " ".join((first, *rest)).split() == text.split()
    assert indented(text, 100) == text


def test_repeated_layers_are_told_once() -> None:
    lines = graph_text(GRAPH)
    assert len(lines) == 1 + 1 + 1 + 3 + 1
    assert lines[2].strip() == "30 times:"


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


def test_engine_is_deleted_by_its_model_name_and_told(
    daemon: ScriptedDaemon, script: Script
) -> None:
    script.engines = [an_engine({}, {})]
    engine = script.engines[0]
    done = millrace(daemon, "delete", engine.model)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"deleted {DIGEST[:12]}  {engine.model}")
    assert [request.name for request in script.asked] == [engine.name]


def test_programs_are_told_what_was_deleted_and_cancelled(
    daemon: ScriptedDaemon, script: Script
) -> None:
    script.engines = [an_engine({}, {})]
    script.builds = [a_build(compiler_pb2.BUILD_STATE_QUEUED)]
    deleted = json.loads(millrace(daemon, "delete", script.engines[0].model, "--json").stdout)
    assert deleted["name"] == script.engines[0].name
    cancelled = json.loads(millrace(daemon, "cancel", DIGEST[:8], "--json").stdout)
    assert cancelled["state"] == "BUILD_STATE_CANCELLED"


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


def test_no_engine_is_deleted_where_several_are_meant(
    daemon: ScriptedDaemon, script: Script
) -> None:
    script.engines = [an_engine({}, {}), an_engine({}, {})]
    script.engines[1].key.arch = "sm_90"
    done = millrace(daemon, "delete", script.engines[0].model)
    assert done.returncode == 1
    assert "has several engines" in done.stderr
    assert script.asked == []


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
