"""The report as one HTML page that needs nothing else: figures, and plots of them."""

import json
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from millrace.cli.bench.charts import Chart
from millrace.cli.bench.driver import Measurement
from millrace.cli.bench.summary import LATENCIES, values_of
from millrace.cli.bench.timeline import Slo, Timeline, percentile
from millrace.cli.output import count_text

# More than a plot can show: the rest is left out evenly.
_MAX_POINTS = 1500
_NUM_BINS = 80
# Values that lie further apart than so many times are shown on a logarithmic axis.
_LOG_FROM = 20

_STYLE = """
:root{--fg:#1c2430;--dim:#5b6675;--bg:#fff;--card:#f6f7f9;--grid:#e3e6ea;--c0:#2563a8;--c1:#c2571a;
--bad:#b3261e}
@media(prefers-color-scheme:dark){:root{--fg:#e6e9ee;--dim:#9aa5b4;--bg:#14181e;--card:#1d232b;
--grid:#2d3540;--c0:#6ea8e6;--c1:#f0975a;--bad:#f2867f}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--fg);background:var(--bg);margin:2rem auto;
max-width:1180px;padding:0 1.2rem}
h1{font-size:1.4rem;margin:0}h2{font-size:1rem;margin:0 0 .3rem}
p.sub{color:var(--dim);margin:.2rem 0 1.4rem}
.tiles{display:flex;flex-wrap:wrap;gap:.8rem;margin-bottom:1.4rem}
.tile{background:var(--card);border-radius:8px;padding:.7rem 1rem;min-width:8.5rem}
.tile b{display:block;font-size:1.45rem;font-weight:600}.tile span{color:var(--dim);font-size:.85rem}
.figures{overflow-x:auto;margin-bottom:1.6rem}table{border-collapse:collapse}
th,td{padding:.3rem 1.1rem .3rem 0;text-align:right;font-variant-numeric:tabular-nums}
th{color:var(--dim);font-weight:500}th:first-child,td:first-child{text-align:left}
tbody tr{border-top:1px solid var(--grid)}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(430px,100%),1fr));gap:1.4rem}
figure{margin:0;background:var(--card);border-radius:8px;padding:.9rem 1rem .6rem}
figcaption{color:var(--dim);font-size:.85rem}svg{width:100%;height:auto;display:block}
.grid{stroke:var(--grid)}.axis{stroke:var(--dim)}.tick{fill:var(--dim);font-size:11.5px}
.line{fill:none;stroke-width:2;stroke-linejoin:round}.area{stroke:none;opacity:.16}
.c0.line,.c0.rule{stroke:var(--c0)}.c0.area,.c0.dot,.c0.name{fill:var(--c0)}
.c1.line,.c1.rule{stroke:var(--c1)}.c1.area,.c1.dot,.c1.name{fill:var(--c1)}
.bad.rule{stroke:var(--bad)}.bad.dot,.bad.name{fill:var(--bad)}.dot{opacity:.6}
.rule{stroke-dasharray:5 4;stroke-width:1.4}.name{font-size:11.5px}
.dim.rule{stroke:var(--dim);stroke-dasharray:2 3}.dim.name{fill:var(--dim)}
.name{paint-order:stroke;stroke:var(--card);stroke-width:4px;stroke-linejoin:round}
@media(max-width:600px){body{margin:1.2rem auto}.tiles{display:grid;grid-template-columns:1fr 1fr}
.tile{min-width:0}table{width:100%;font-size:.8rem}th,td{padding:.3rem 0 .3rem .5rem}
th:first-child,td:first-child{padding-left:0}.tick,.name{font-size:14.5px}}
.warn{border-left:4px solid var(--c1);background:var(--card);padding:.6rem 1rem;margin-bottom:1.4rem}
details{margin-top:1.6rem;color:var(--dim)}pre{white-space:pre-wrap;font-size:12.5px}
"""


def report_html(document: dict[str, Any], measured: Measurement, slo: Slo) -> str:
    """The page.

    Args:
        document: what `summarize` says, and what was asked of whom.
    """
    finished = [t for t in measured.timelines if t.is_finished]
    plots = [
        _distribution("Time to first token", values_of("ttft", finished), slo.limits.get("ttft")),
        _distribution("Between tokens", values_of("itl", finished), slo.limits.get("itl")),
        _throughput(measured),
        _concurrency(measured),
        _over_time(measured, slo.limits.get("ttft")),
        _distribution("Whole answer", values_of("e2e", finished), slo.limits.get("e2e")),
    ]
    model, target = escape(document["model"]), escape(document["target"])
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{model}: bench serve</title><style>{_STYLE}</style>"
        f'<h1>{model}</h1><p class="sub">{target}, {_load_text(document)}</p>'
        f"{_warnings(document)}{_tiles(document)}{_table(document)}"
        f'<div class="plots">{"".join(plots)}</div>'
        "<details><summary>All figures</summary><pre>"
        f"{escape(json.dumps(document, indent=2, ensure_ascii=False))}</pre></details></html>\n"
    )


def _load_text(document: dict[str, Any]) -> str:
    load = document["load"]
    if "concurrency" in load:
        text = f"closed loop of {count_text(load['concurrency'], 'stream')}"
    elif "rate" in load:
        burst = "" if load["burstiness"] == 1 else f", burstiness {load['burstiness']:g}"
        text = f"{load['rate']:g} requests a second on average{burst}"
    else:
        text = f"arrivals of a trace at {load['speed']:g} times its speed"
    return escape(f"{document['protocol']}, {text}, seed {load['seed']}")


def _warnings(document: dict[str, Any]) -> str:
    said = []
    if document["is_interrupted"]:
        said.append("Interrupted: this is what was measured until then.")
    if document["lag"]["fell_behind"]:
        said.append("The generator fell behind its schedule: latencies include its own lateness.")
    for reason, count in document["requests"]["failed"].items():
        said.append(f"{count} failed with {reason}: {document['failures'][reason]}")
    return "".join(f'<div class="warn">{escape(text)}</div>' for text in said)


def _tiles(document: dict[str, Any]) -> str:
    requests = document["requests"]
    tiles = [
        (f"{document['output_tokens_per_s']:,.0f}", "tokens/s out"),
        (f"{document['requests_per_s']:,.2f}", "requests/s"),
        (f"{requests['finished']:,} of {requests['sent']:,}", "requests finished"),
        (f"{document['mean_concurrency']:,.1f}", "at once on average"),
        (f"{document['duration_s']:,.1f} s", "measured"),
    ]
    if good := document.get("goodput"):
        tiles.insert(2, (f"{good['share']:.1%}", f"good: {good['requests_per_s']:,.2f} requests/s"))
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{b}</b><span>{s}</span></div>' for b, s in tiles)
        + "</div>"
    )


def _table(document: dict[str, Any]) -> str:
    columns = ("mean", "p50", "p90", "p99", "max")
    rows = []
    named = [(title, document[f"{name}_ms"]) for name, title in LATENCIES.items()]
    named.append(("sent late (the generator's own)", document["lag"]["send_ms"]))
    for title, spread in named:
        if spread:
            cells = "".join(f"<td>{spread[column]:,.1f}</td>" for column in columns)
            rows.append(f"<tr><td>{title}</td>{cells}</tr>")
    head = "".join(f"<th>{column}</th>" for column in columns)
    body = f"<thead><tr><th>ms</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="figures"><table>{body}</table></div>'


def _figure(title: str, caption: str, chart: Chart) -> str:
    return (
        f"<figure><h2>{escape(title)}</h2>{chart.svg(title)}"
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _distribution(title: str, seconds: list[float], limit_s: float | None) -> str:
    ordered = sorted(value * 1000 for value in seconds) or [0.0]
    values = ordered if limit_s is None else [*ordered, limit_s * 1000]
    low, high = min(values), max(values)
    is_log = high > _LOG_FROM * low
    x_range = (low if is_log else 0.0, high * 1.1)
    chart = Chart(x_range, (0, 100), "milliseconds", y_unit="%", is_log_x=is_log)
    shares = [(value, 100 * (i + 1) / len(ordered)) for i, value in enumerate(ordered)]
    chart.line([*_thinned(shares), (chart.x.high, 100.0)], "c0", is_filled=True)
    if limit_s is not None:
        chart.vertical(limit_s * 1000, "objective", "bad", row=2)
    for row, share in enumerate((50, 99)):
        value = percentile(ordered, share) or 0.0
        chart.vertical(value, f"p{share} {value:,.1f} ms", "dim", row=row)
    return _figure(title, "share that is at most as slow", chart)


def _throughput(measured: Measurement) -> str:
    edges, width_s = _bins(measured)
    tokens = [0.0] * len(edges)
    for timeline in measured.timelines:
        for at_s, count in timeline.arrivals:
            tokens[min(int((at_s - measured.start_s) / width_s), len(edges) - 1)] += count
    points = [(edge, count / width_s) for edge, count in zip(edges, tokens, strict=True)]
    chart = _time_chart(measured, max(rate for _, rate in points))
    chart.line(points, "c0", is_filled=True)
    return _figure("Tokens a second", "as they arrived", chart)


def _concurrency(measured: Measurement) -> str:
    changes = sorted(
        [(t.start_s, 1) for t in measured.timelines] + [(t.end_s, -1) for t in measured.timelines]
    )
    edges, width_s = _bins(measured)
    points, running, place = [], 0, 0
    for edge in edges:
        while place < len(changes) and changes[place][0] - measured.start_s <= edge + width_s / 2:
            running += changes[place][1]
            place += 1
        points.append((edge, float(running)))
    chart = _time_chart(measured, max(count for _, count in points))
    chart.is_count_y = True
    chart.line(points, "c1", is_filled=True)
    return _figure("Requests at once", "sent, and not ended", chart)


def _over_time(measured: Measurement, limit_s: float | None) -> str:
    def points(chosen: Callable[[Timeline], bool], value: Callable[[Timeline], float]) -> Any:
        found = [(t.start_s - measured.start_s, value(t)) for t in measured.timelines if chosen(t)]
        return _thinned(found)

    felt = points(lambda t: t.is_finished, lambda t: (t.ttft_s or 0.0) * 1000)
    highest = max([value for _, value in felt] + [(limit_s or 0.0) * 1000], default=1.0)
    chart = _time_chart(measured, highest)
    chart.dots(felt, "c0")
    chart.dots(points(lambda t: bool(t.failure), lambda _: highest), "bad")
    if limit_s is not None:
        chart.horizontal(limit_s * 1000, "objective", "bad")
    caption = "milliseconds, by when it was sent; red dots at the top failed"
    return _figure("Time to first token, request by request", caption, chart)


def _time_chart(measured: Measurement, highest: float) -> Chart:
    end_s = max(measured.end_s - measured.start_s, 1e-3)
    return Chart((0, end_s), (0, highest * 1.08), "seconds from the first request")


def _bins(measured: Measurement) -> tuple[list[float], float]:
    """Middles and width of equal parts of the time."""
    width_s = max(measured.end_s - measured.start_s, 1e-3) / _NUM_BINS
    return [(n + 0.5) * width_s for n in range(_NUM_BINS)], width_s


def _thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """At most `_MAX_POINTS` of them, the last included."""
    if len(points) <= _MAX_POINTS:
        return points
    step = (len(points) - 1) / (_MAX_POINTS - 1)
    return [points[round(n * step)] for n in range(_MAX_POINTS)]
