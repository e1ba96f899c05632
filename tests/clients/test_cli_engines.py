"""`millrace engines`, `inspect`, `load` and `delete`: what a store holds, and which of it is meant."""

import json
import re

from google.protobuf.duration_pb2 import Duration
from millrace.cli.inspecting import graph_text
from millrace.compiler.v1 import compiler_pb2

from tests.clients.command import millrace
from tests.clients.scripted_daemon import (
    DIGEST,
    GRAPH,
    Script,
    ScriptedDaemon,
    a_build,
    an_engine,
)


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


def test_repeated_layers_are_told_once() -> None:
    lines = graph_text(GRAPH)
    assert len(lines) == 1 + 1 + 1 + 3 + 1
    assert lines[2].strip() == "30 times:"


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


def test_no_engine_is_deleted_where_several_are_meant(
    daemon: ScriptedDaemon, script: Script
) -> None:
    script.engines = [an_engine({}, {}), an_engine({}, {})]
    script.engines[1].key.arch = "sm_90"
    done = millrace(daemon, "delete", script.engines[0].model)
    assert done.returncode == 1
    assert "has several engines" in done.stderr
    assert script.asked == []
