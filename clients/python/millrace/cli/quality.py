"""`millrace inspect --quality`: what quantizing cost an engine, as its build measured it."""

import json
import re
from typing import Any

from millrace.cli import output
from millrace.cli.failures import NOT_FOUND, CommandFailed
from millrace.cli.listing import recipe_text
from millrace.cli.loading import find_engine
from millrace.client import Client
from millrace.engine.v1 import engine_pb2

_TITLE = "quality.json"
_BAR_CELLS = 40
# Eighths of a cell, for bars that end between cells.
_EIGHTHS = " ▏▎▍▌▋▊▉"


def show_quality(client: Client, name: str, quant: str, *, as_json: bool) -> None:
    """Prints an engine's quality report: numbers, worst weights, and a bar per layer.

    Raises:
        CommandFailed: the engine has none, or one of an older form.
    """
    engine = client.get_engine(find_engine(client, name, quant).name).engine
    report = _read_report(client, engine)
    if as_json:
        output.print_json(report)
        return
    if "contexts" not in report["needle"]:
        raise CommandFailed(f"{engine.name} has a report of an older form: see it with --json")
    _show_numbers(engine, report)
    _show_needles(report["needle"])
    _show_worst(report)
    output.print_line("")
    output.print_fields(
        (
            ("error", "of the weight's own output, relative"),
            ("impact", "error times the share of the residual stream that its block adds"),
            ("drift", "as error, with all layers before it quantized too"),
        )
    )
    output.print_line("\neach layer's largest impact, by which weights are ranked, and its error:")
    for line in impact_plot(report["weights"]):
        output.print_line(f"  {line}")


def _read_report(client: Client, engine: engine_pb2.Engine) -> dict[str, Any]:
    for layer in engine.layers:
        if layer.title == _TITLE:
            report: dict[str, Any] = json.loads(client.read_blob(layer.digest))
            return report
    text = recipe_text(engine.key.quant)
    raise CommandFailed(f"{engine.name} ({text}) has no quality report", NOT_FOUND)


def impact_plot(weights: list[dict[str, Any]]) -> list[str]:
    """A bar per layer: its weight of the largest `impact`; what is in no layer has its own bar."""
    largest: dict[str, dict[str, Any]] = {}
    for weight in weights:
        layer = re.match(r"layers\.\d+", weight["weight"])
        name = layer[0] if layer else weight["weight"]
        if name not in largest or weight["impact"] > largest[name]["impact"]:
            largest[name] = weight
    highest = max((weight["impact"] for weight in largest.values()), default=0.0)
    width = max(map(len, largest), default=0)
    return [
        f"{name.ljust(width)}  {_bar(weight['impact'] / highest if highest else 0.0)}  "
        f"{weight['impact']:6.2%}  {weight['error']:6.2%}{_role(weight['weight'])}"
        for name, weight in largest.items()
    ]


def _role(name: str) -> str:
    """Which of its layer's weights it is; empty for one in no layer."""
    layer = re.match(r"layers\.\d+\.", name)
    return f"  {name[layer.end() :]}" if layer else ""


def _bar(share: float) -> str:
    whole, eighths = divmod(round(share * _BAR_CELLS * 8), 8)
    return ("█" * whole + _EIGHTHS[eighths] * (whole < _BAR_CELLS)).ljust(_BAR_CELLS)


def _show_numbers(engine: engine_pb2.Engine, report: dict[str, Any]) -> None:
    kl, perplexity, limits = report["kl"], report["perplexity"], report["limits"]
    output.print_fields(
        (
            ("engine", engine.name),
            ("quant", recipe_text(engine.key.quant)),
            ("KL divergence", f"{kl['mean']:.4g} nats a token, 99 % below {kl['p99']:.4g}"),
            ("", f"allowed {limits['max_kl']:g}"),
            ("same top token", f"{report['top1_agreement']:.1%}"),
            (
                "perplexity",
                f"{perplexity['unquantized']:.3f} -> {perplexity['quantized']:.3f} "
                f"({perplexity['increase']:+.2%}, allowed "
                f"{limits['max_perplexity_increase']:+.2%})",
            ),
            ("needles", needle_text(report["needle"])),
            ("measured on", f"{report['measured_tokens']} tokens that no calibration saw"),
            ("kept in bf16", ", ".join(report["kept"]) or "nothing"),
            *(
                (("", f"of these the build chose {', '.join(report['auto_kept'])}"),)
                if report["auto_kept"]
                else ()
            ),
        )
    )


def needle_text(needle: dict[str, Any]) -> str:
    """The long-context probe in a line."""
    if not needle["is_applicable"]:
        return "not applicable: the unquantized model retrieves none"
    return (
        f"{needle['num_retrieved']} retrieved of the {needle['num_scored']} that the unquantized "
        "model retrieves"
    )


def needle_rows(contexts: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The table of the long-context probe: a row a context, a column a depth, and why it was skipped."""
    depths = sorted({needle["depth"] for context in contexts for needle in context["needles"]})
    rows = []
    for context in contexts:
        found = {needle["depth"]: _outcome(needle) for needle in context["needles"]}
        note = f"skipped: {context['skipped']}" if context["skipped"] else ""
        rows.append([f"{context['tokens']} tokens", *(found.get(d, "") for d in depths), note])
    return ["needles in", *(f"{depth:.0%} deep" for depth in depths), ""], rows


def _outcome(needle: dict[str, Any]) -> str:
    if not needle["unquantized"]:
        return "not scored"
    return "found" if needle["quantized"] else "LOST"


def _show_needles(needle: dict[str, Any]) -> None:
    output.print_line("")
    output.print_table(*needle_rows(needle["contexts"]), "nothing was asked")


def _show_worst(report: dict[str, Any]) -> None:
    by_name = {weight["weight"]: weight for weight in report["weights"]}
    output.print_line("")
    output.print_table(
        ("worst weights", "stored as", "impact", "error", "drift"),
        [
            (name, by_name[name]["layout"], f"{by_name[name]['impact']:.2%}",
             f"{by_name[name]['error']:.2%}", f"{by_name[name]['drift']:.2%}")
            for name in report["worst"]
        ],
        "nothing is quantized",
    )  # fmt: skip
