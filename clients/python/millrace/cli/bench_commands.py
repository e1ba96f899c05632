"""The commands that put a server under load."""

from typing import Annotated

import typer

from millrace.cli.failures import USAGE, CommandFailed
from millrace.cli.options import IS_JSON, RUNTIME, Runtime

commands = typer.Typer(
    name="bench",
    help="Put a server under load, and measure it.",
    epilog="Example: millrace bench serve -c 16 --requests 200",
    no_args_is_help=True,
)


def _keep_is_json(context: typer.Context, json_file: str) -> str:
    context.meta[IS_JSON] = json_file == "-"
    return json_file


@commands.callback()
def bench() -> None:
    """Put a server under load, and measure it."""


@commands.command(
    epilog='Example: millrace bench serve --rate 4 --in 64-256 --out 128 --goodput "ttft=0.5s,itl=50ms"'
)
def serve(
    rate: Annotated[
        float | None,
        typer.Option(
            "--rate", metavar="N", help="Open loop: requests a second, whether others end or not."
        ),
    ] = None,
    burstiness: Annotated[
        float,
        typer.Option(
            "--burstiness", metavar="N", help="Of an open loop: 1 is Poisson, 0.2 bursts."
        ),
    ] = 1.0,
    concurrency: Annotated[
        int | None,
        typer.Option(
            "--concurrency", "-c", metavar="N", min=1, help="Closed loop: requests at once (8)."
        ),
    ] = None,
    trace: Annotated[
        str,
        typer.Option(
            "--trace",
            metavar="CSV",
            help="Lengths, and without the above moments, of real traffic.",
        ),
    ] = "",
    speed: Annotated[
        float,
        typer.Option("--speed", metavar="N", help="Play a trace's moments so many times as fast."),
    ] = 1.0,
    input_tokens: Annotated[
        str,
        typer.Option(
            "--in", metavar="N|LOW-HIGH", help="Prompt tokens (128); limits of a trace's."
        ),
    ] = "",
    output_tokens: Annotated[
        str,
        typer.Option("--out", metavar="N|LOW-HIGH", help="Answer tokens (128); limits likewise."),
    ] = "",
    requests: Annotated[
        int | None,
        typer.Option("--requests", "-r", metavar="N", min=1, help="In all (100, or the trace)."),
    ] = None,
    duration_s: Annotated[
        float | None,
        typer.Option("--duration", metavar="SECONDS", help="Seconds after which nothing is sent."),
    ] = None,
    timeout_s: Annotated[
        float | None,
        typer.Option("--timeout", metavar="SECONDS", help="Seconds a request may take."),
    ] = None,
    warm_up: Annotated[
        int,
        typer.Option("--warm-up", metavar="N", min=0, help="Requests before, which do not count."),
    ] = 4,
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", help="Of moments, lengths and prompts.")
    ] = 0,
    goodput: Annotated[
        str,
        typer.Option(
            "--goodput", metavar="SLO", help="What good requests keep to: ttft=0.5s,itl=50ms."
        ),
    ] = "",
    calls: Annotated[
        int,
        typer.Option("--calls", metavar="N", min=0, help="gRPC calls to share; 0: one a request."),
    ] = 1,
    openai: Annotated[
        str,
        typer.Option(
            "--openai", metavar="URL", help="Any server of OpenAI's API: http://HOST:PORT/v1."
        ),
    ] = "",
    model: Annotated[
        str, typer.Option("--model", metavar="MODEL", help="Where there are several.")
    ] = "",
    json_file: Annotated[
        str,
        typer.Option(
            "--json",
            metavar="FILE",
            help="Write all figures; -: to stdout.",
            callback=_keep_is_json,
        ),
    ] = "",
    html_file: Annotated[
        str, typer.Option("--html", metavar="FILE", help="Write a report with plots.")
    ] = "",
    runtime: Runtime = RUNTIME,
) -> None:
    """Measure latencies, throughput and goodput of a server.

    A runtime, a gateway, or any server of OpenAI's API.

    Ctrl-C ends it and shows what was measured until then. The generator's own lateness is
    measured too, and told where it matters.
    """
    from millrace.cli.bench.command import Load, Where
    from millrace.cli.bench.command import serve as run

    for name, value in (
        ("--rate", rate), ("--burstiness", burstiness), ("--speed", speed),
        ("--duration", duration_s), ("--timeout", timeout_s),
    ):  # fmt: skip
        if value is not None and not 0 < value < float("inf"):
            raise CommandFailed(f"{name} is a number above 0", USAGE)
    load = Load(
        rate=rate,
        burstiness=burstiness,
        concurrency=concurrency,
        trace=trace,
        speed=speed,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        requests=requests,
        duration_s=duration_s,
        timeout_s=timeout_s,
        warm_up=warm_up,
        seed=seed,
        goodput=goodput,
    )
    raise typer.Exit(run(Where(runtime, calls, openai, model), load, json_file, html_file))
