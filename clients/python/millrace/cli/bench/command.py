"""`millrace bench serve`: from options to a load, and from what was measured to what is shown."""

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from millrace.cli import output
from millrace.cli.bench.driver import Driver, Measurement, RequestFailed, Target, warm_up
from millrace.cli.bench.report import report_html
from millrace.cli.bench.summary import LATENCIES, request_rows, summarize
from millrace.cli.bench.targets import grpc_target, openai_target
from millrace.cli.bench.timeline import Slo
from millrace.cli.bench.trace import TraceError, read_trace, trace_arrivals, trace_lengths
from millrace.cli.bench.workload import Lengths, Planned, drawn_lengths, open_loop, plan
from millrace.cli.connecting import security
from millrace.cli.failures import FAILED, INTERRUPTED, OK, USAGE, CommandFailed

_DEFAULT_REQUESTS = 100
_DEFAULT_CONCURRENCY = 8
_DEFAULT_LENGTHS = "128"


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent, as it was asked for; unset is None.

    Args:
        rate: requests a second of an open loop; without it and a trace, the loop is closed.
        burstiness: see `open_loop`.
        concurrency: streams of a closed loop.
        input_tokens, output_tokens: lengths, or limits of a trace's.
        speed: of a trace's own moments.
        duration_s: nothing is sent after it.
        warm_up: requests that are sent at once before, and not measured.
    """

    rate: float | None = None
    burstiness: float = 1.0
    concurrency: int | None = None
    trace: str = ""
    speed: float = 1.0
    input_tokens: str = ""
    output_tokens: str = ""
    requests: int | None = None
    duration_s: float | None = None
    timeout_s: float | None = None
    warm_up: int = 4
    seed: int = 0
    goodput: str = ""


@dataclass(frozen=True, slots=True)
class Where:
    """What is put under load: a runtime or gateway over gRPC, or the API at `openai_url`."""

    runtime: str
    calls: int = 1
    openai_url: str = ""
    model: str = ""

    def open(self) -> AbstractAsyncContextManager[tuple[Target, str]]:
        """The target, and the name of its model."""
        if not self.openai_url:
            return grpc_target(self.runtime, self.calls, self.model)
        environ = os.environ
        key = environ.get("OPENAI_API_KEY") or environ.get("MILLRACE_CLI_API_KEY", "")
        # The CA may be of other servers than one that is spoken to in plaintext.
        is_https = self.openai_url.startswith("https://")
        tls = security().context() if is_https else None
        return openai_target(self.openai_url, key, self.model, tls)


@dataclass(frozen=True, slots=True)
class Plans:
    """A checked load: what is sent before, what is measured, and by how many streams."""

    before: list[Planned]
    measured: Iterator[Planned]
    concurrency: int | None


def serve(where: Where, load: Load, json_file: str, html_file: str) -> int:
    """Runs the load, shows what was measured; the exit code.

    Raises:
        CommandFailed: the load makes no sense, or a file cannot be written.
        MillraceError: nothing answers.
    """
    slo, plans = _parse_slo(load.goodput), plans_of(load)
    for name in filter(None, (json_file, html_file)):
        if name != "-" and not Path(name).parent.is_dir():
            raise CommandFailed(f"{name} cannot be written: its folder does not exist", USAGE)
    document, measured = asyncio.run(_run(where, load, slo, plans))
    if json_file:
        rows = {"each_request": request_rows(measured)}
        _write(json_file, json.dumps(document | rows, ensure_ascii=False) + "\n")
    if html_file:
        _write(html_file, report_html(document, measured, slo))
    if json_file != "-":
        show(document)
    if measured.is_interrupted:
        return INTERRUPTED
    return OK if document["requests"]["finished"] else FAILED


def measure(where: Where, load: Load) -> dict[str, Any]:
    """What the requests of `load` felt, for programs; raises as `serve`."""
    return asyncio.run(_run(where, load, _parse_slo(load.goodput), plans_of(load)))[0]


def plans_of(load: Load) -> Plans:
    """The requests that `load` describes.

    Raises:
        CommandFailed: it makes no sense.
    """
    if load.concurrency is not None and load.rate is not None:
        raise CommandFailed("a loop is open or closed: give --rate or --concurrency", USAGE)
    if load.burstiness != 1 and load.rate is None:
        raise CommandFailed("--burstiness is of an open loop: give --rate", USAGE)
    has_moments = bool(load.trace) and load.rate is None and load.concurrency is None
    if load.speed != 1 and not has_moments:
        problem = "--speed plays a trace's moments: give --trace, without --rate or --concurrency"
        raise CommandFailed(problem, USAGE)
    try:
        inputs = Lengths.parse(load.input_tokens) if load.input_tokens else None
        outputs = Lengths.parse(load.output_tokens) if load.output_tokens else None
        rows = read_trace(Path(load.trace), load.requests) if load.trace else None
    except (ValueError, TraceError) as error:
        raise CommandFailed(str(error), USAGE) from None
    default = Lengths.parse(_DEFAULT_LENGTHS)

    def lengths(seed: int) -> Iterator[tuple[int, int]]:
        if rows is not None:
            return trace_lengths(rows, inputs, outputs)
        return drawn_lengths(inputs or default, outputs or default, seed)

    arrivals, concurrency, limit = None, load.concurrency, load.requests
    if load.rate is not None:
        arrivals = open_loop(load.rate, load.burstiness, load.seed)
    elif rows is not None and concurrency is None:
        arrivals = trace_arrivals(rows, load.speed)
    elif concurrency is None:
        concurrency = _DEFAULT_CONCURRENCY
    if limit is None and load.duration_s is None:
        limit = len(rows) if rows is not None else _DEFAULT_REQUESTS
    # Numbers below 0: their prompts are none of the measured ones.
    drawn = lengths(load.seed - 1)
    before = [Planned(-1 - n, None, *next(drawn)) for n in range(load.warm_up)]
    return Plans(before, plan(arrivals, lengths(load.seed), limit), concurrency)


async def _run(
    where: Where, load: Load, slo: Slo, plans: Plans
) -> tuple[dict[str, Any], Measurement]:
    async with where.open() as (target, model):
        try:
            await warm_up(target, plans.before, load.seed)
        except RequestFailed as error:
            raise CommandFailed(f"the warm-up failed ({error.reason}): {error}") from None
        driver = Driver(
            target,
            plans.measured,
            concurrency=plans.concurrency,
            duration_s=load.duration_s,
            timeout_s=load.timeout_s,
            seed=load.seed,
        )
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, driver.stop)
        telling = asyncio.create_task(_tell_progress(driver))
        try:
            measured = await driver.run()
        finally:
            loop.remove_signal_handler(signal.SIGINT)
            telling.cancel()
            with suppress(asyncio.CancelledError):
                await telling
    asked = {k: v for k, v in asdict(load).items() if v is not None and v != ""}
    if plans.concurrency is not None:
        asked["concurrency"] = plans.concurrency
    at = where.openai_url or where.runtime
    protocol = "openai" if where.openai_url else "grpc"
    place = {"model": model, "target": at, "protocol": protocol}
    if not where.openai_url:
        place["calls"] = where.calls  # type: ignore[assignment]
    return {**place, "load": asked, **summarize(measured, slo)}, measured


def show(document: dict[str, Any]) -> None:
    """The report for people: what was sent on stderr, numbers on stdout."""
    requests, load = document["requests"], document["load"]
    if document["is_interrupted"]:
        output.say("[yellow]interrupted: this is what was measured until then[/]")
    is_closed = "concurrency" in load
    loop = output.count_text(load["concurrency"], "stream") if is_closed else "open loop"
    output.say(
        f"[bold]{document['model']}[/] at {document['target']}: {loop}, "
        f"{requests['finished']} of {requests['sent']} requests finished "
        f"in {output.duration_text(document['duration_s'])}"
    )
    columns = ("p50", "p90", "p99", "max")
    rows = [
        (f"{title} ({name.upper()})", *(f"{spread[column]:.1f} ms" for column in columns))
        for name, title in LATENCIES.items()
        if (spread := document[f"{name}_ms"])
    ]
    output.print_table(("", *columns), rows, "no request finished")
    output.print_line(
        f"{document['output_tokens_per_s']:.1f} tokens/s out, "
        f"{document['total_tokens_per_s']:.1f} with prompts, "
        f"{document['requests_per_s']:.2f} requests/s, "
        f"{document['mean_concurrency']:.1f} at once on average"
    )
    if good := document.get("goodput"):
        output.print_line(
            f"goodput {good['requests_per_s']:.2f} requests/s, "
            f"{good['output_tokens_per_s']:.1f} tokens/s: {good['share']:.1%} keep to "
            + ", ".join(f"{k} {v * 1000:g} ms" for k, v in good["objectives_s"].items())
        )
    for reason, count in requests["failed"].items():
        output.print_line(f"{count} failed with {reason}: {document['failures'][reason]}")
    if requests["unfinished"]:
        output.print_line(f"{requests['unfinished']} broken off")
    if (lag := document["lag"])["fell_behind"]:
        sent, loop_ms = lag["send_ms"], lag["loop_ms"] or {"p99": 0.0}
        output.say(
            f"[yellow]the generator fell behind: requests were sent {sent['p99']:.1f} ms late and "
            f"its event loop ran {loop_ms['p99']:.1f} ms late (p99); the latencies above include "
            "that. Send less, or from several machines.[/]"
        )


async def _tell_progress(driver: Driver) -> None:
    """A line on a terminal that is redrawn each half second; nothing elsewhere."""
    if not output.is_fancy(is_stderr=True):
        return
    with output.console(is_stderr=True).status("") as status:
        while True:
            timelines = driver.measured.timelines
            ended = sum(t.is_over for t in timelines)
            failed = sum(bool(t.failure) for t in timelines)
            more = f", [red]{failed} failed[/]" if failed else ""
            status.update(f"{driver.num_running} running, {ended} ended{more}  (Ctrl-C ends it)")
            await asyncio.sleep(0.5)


def _parse_slo(text: str) -> Slo:
    try:
        return Slo.parse(text)
    except ValueError as error:
        raise CommandFailed(str(error), USAGE) from None


def _write(name: str, text: str) -> None:
    if name == "-":
        output.print_line(text.rstrip("\n"))
        return
    try:
        Path(name).write_text(text)
    except OSError as error:
        raise CommandFailed(f"{name} cannot be written: {error.strerror}") from None
    output.say(f"wrote {name}")
