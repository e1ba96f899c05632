"""`millrace inspect`: what an engine is made of, and what became of the model's graph."""

import hashlib
import json
from collections import Counter
from typing import Any

from millrace.cli import output
from millrace.cli.listing import recipe_text
from millrace.cli.loading import find_engine
from millrace.client import Client
from millrace.compiler.v1 import compiler_pb2
from millrace.engine.v1 import engine_pb2

_SOURCE, _FINAL = "graph.source.json", "graph.json"
_KERNELS = "kernels/index.json"
# The graph's lines about a checkpoint that came quantized: what was kept, what was not.
_IMPORT_NOTES = "checkpoint_quantization"


def inspect(client: Client, name: str, quant: str, *, with_graph: bool, as_json: bool) -> None:
    """Prints an engine: key, sizes, layers, graph, kernels, build times."""
    found = client.get_engine(find_engine(client, name, quant).name)
    documents = _read_documents(client, found.engine)
    if as_json:
        output.print_json({**output.to_dict(found), **documents})
        return
    _show_key(found.engine, documents[_FINAL])
    _show_layers(found.engine)
    output.print_line("")
    output.print_fields(
        (
            *_graph_fields(documents),
            *_kernel_fields(documents.get(_KERNELS)),
            *_build_fields(found),
        )
    )
    if with_graph:
        _show_graphs(documents)


def _read_documents(client: Client, engine: engine_pb2.Engine) -> dict[str, Any]:
    """The engine's JSON layers that people look at, by title."""
    return {
        layer.title: json.loads(client.read_blob(layer.digest))
        for layer in engine.layers
        if layer.title in (_SOURCE, _FINAL, _KERNELS)
    }


def graph_text(graph: dict[str, Any]) -> list[str]:
    """A graph's pipeline, a line per node; equal layers are told once."""
    lines = [f"in   {name}: {_spec_text(spec)}" for name, spec in graph["inputs"].items()]
    lines += _folded([_node_text(node) for node in graph["nodes"]])
    return [*lines, f"out  {', '.join(graph['outputs'])}"]


def _node_text(node: dict[str, Any]) -> str:
    attrs = ", ".join(f"{name}={_short(value)}" for name, value in node["attrs"].items())
    weights = ", ".join(sorted(node["weights"].values()))
    text = f"{', '.join(node['outputs'])} = {node['op']}({', '.join(node['inputs'])})"
    return text + (f" {{{attrs}}}" if attrs else "") + (f" [{weights}]" if weights else "")


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > 4:
        return f"({len(value)} values)"
    return str(value)


def _spec_text(spec: dict[str, Any]) -> str:
    return f"{spec['dtype']}[{', '.join(map(str, spec['dims']))}]"


def _folded(lines: list[str]) -> list[str]:
    """`lines` with the run of repeated layers cut to its first turn.

    Layers differ in names and numbers only, so lines are compared without their digits.
    """
    shapes = ["".join(" " if c.isdigit() else c for c in line).split() for line in lines]
    best: tuple[int, int, int] = (0, 0, 1)  # first line, lines a turn, turns
    for first in range(min(len(lines), 16)):
        for period in range(3, 40):
            turns = 1
            while shapes[first : first + period] == shapes[
                first + turns * period : first + (turns + 1) * period
            ] and first + (turns + 1) * period <= len(lines):
                turns += 1
            if turns > 1 and (turns - 1) * period > (best[2] - 1) * best[1]:
                best = (first, period, turns)
    first, period, turns = best
    if turns == 1:
        return [f"     {line}" for line in lines]
    before, turn, after = (
        lines[:first],
        lines[first : first + period],
        lines[first + turns * period :],
    )
    return [
        *(f"     {line}" for line in before),
        f"     {turns} times:",
        *(f"       {line}" for line in turn),
        *(f"     {line}" for line in after),
    ]


def _show_key(engine: engine_pb2.Engine, graph: dict[str, Any]) -> None:
    total = sum(layer.size_bytes for layer in engine.layers)
    config = graph["config"]
    shape = ", ".join(
        f"{config[name]} {text}"
        for name, text in (
            ("num_layers", "layers"),
            ("hidden_size", "hidden"),
            ("num_heads", "heads"),
            ("num_kv_heads", "KV heads"),
            ("vocab_size", "tokens"),
        )
        if name in config
    )
    output.print_fields(
        (
            ("engine", engine.name),
            ("model", f"{engine.model} ({config.get('family', 'unknown family')}: {shape})"),
            ("arch", engine.key.arch),
            ("quant", recipe_text(engine.key.quant)),
            ("size", f"{output.bytes_text(total)} in {len(engine.layers)} layers"),
            ("format", str(engine.format_version)),
            ("model digest", engine.key.model_digest),
            ("builder", engine.key.builder),
            ("manifest", engine.manifest.digest),
            ("signed by", _signers(engine)),
            ("tuned on", ", ".join(record.title for record in engine.tunings) or "nothing"),
            ("published", output.age_text(engine.create_time.seconds)),
        )
    )


def _signers(engine: engine_pb2.Engine) -> str:
    """The signers' keys as daemons name them; nobody has verified that they did."""
    keys = {hashlib.sha256(s.public_key).hexdigest()[:12] for s in engine.signatures}
    return ", ".join(sorted(keys)) or "nobody"


def _show_layers(engine: engine_pb2.Engine) -> None:
    output.print_line("")
    output.print_table(
        ("layer", "size", "digest"),
        [
            (layer.title, output.bytes_text(layer.size_bytes), layer.digest[:19])
            for layer in engine.layers
        ],
        "no layers",
    )


def _graph_fields(documents: dict[str, Any]) -> list[tuple[str, str]]:
    graphs = {name: documents[title] for title, name in _NAMES.items() if title in documents}
    final = documents[_FINAL]
    layouts = Counter(weight["layout"] for weight in final["weights"].values())
    return [
        ("graph", " -> ".join(f"{len(graph['nodes'])} nodes" for graph in graphs.values())),
        *((f"  {name}", _ops_text(graph)) for name, graph in graphs.items()),
        ("weights", ", ".join(f"{n} {layout}" for layout, n in layouts.most_common())),
        *(("checkpoint", note) for note in final["config"].get(_IMPORT_NOTES, ())),
    ]


def _show_graphs(documents: dict[str, Any]) -> None:
    for title, name in _NAMES.items():
        if title in documents:
            output.print_line(f"\n{name} ({title})")
            for line in graph_text(documents[title]):
                output.print_indented(f"  {line}")


_NAMES = {_SOURCE: "before", _FINAL: "after"}


def _ops_text(graph: dict[str, Any]) -> str:
    counts = Counter(node["op"] for node in graph["nodes"])
    return ", ".join(f"{count} {op}" for op, count in counts.most_common())


def _kernel_fields(index: dict[str, Any] | None) -> list[tuple[str, str]]:
    if index is None:
        return [("kernels", "none: a CPU compiles its own when it first loads an engine")]
    kernels = index["kernels"]
    counts = Counter(key.replace("[", "/").split("/")[0].split(".")[0] for key in kernels)
    size = output.bytes_text(sum(kernel["code"][1] for kernel in kernels.values()))
    driver = ".".join(map(str, index["min_driver"]))
    text = f"{len(kernels)} for {index['arch']}, {size}, driver for CUDA {driver} or newer"
    return [
        ("kernels", text),
        ("", ", ".join(f"{count} {op}" for op, count in counts.most_common())),
    ]


def _build_fields(found: compiler_pb2.GetEngineResponse) -> list[tuple[str, str]]:
    if not found.HasField("build"):
        return [("built", "its record has expired")]
    build = found.build
    seconds = (build.end_time.ToMilliseconds() - build.start_time.ToMilliseconds()) / 1000
    stages = ", ".join(
        f"{timing.stage} {output.duration_text(timing.duration.ToMilliseconds() / 1000)}"
        for timing in build.stage_timings
    )
    return [
        ("built in", f"{output.duration_text(max(0.0, seconds))} from {build.model_uri}"),
        ("", stages),
    ]
