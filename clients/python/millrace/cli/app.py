"""The `millrace` command's interface: commands, their options, and nothing of what they do.

What a command does is imported when it runs, so that `--help` and shell completion are quick.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from millrace.cli.bench_commands import commands as bench_commands
from millrace.cli.failures import EXIT_CODES_HELP, CommandFailed, report
from millrace.cli.fleet_commands import commands as fleet_commands
from millrace.cli.options import (
    COMPILER,
    ENGINES,
    GENERATING,
    MACHINE,
    RUNTIME,
    AsJson,
    Compiler,
    Limit,
    MaxTokens,
    Quant,
    Runtime,
    Seed,
    State,
    Stop,
    Temperature,
    TopK,
    TopP,
)
from millrace.cli.security_commands import commands as security_commands
from millrace.cli.store_commands import commands as store_commands

if TYPE_CHECKING:
    from millrace.builds import RecipeOptions
    from millrace.generation import GenerateOptions

_IS_FANCY = sys.stdout.isatty() and "NO_COLOR" not in os.environ


class _Commands(TyperGroup):
    """Commands whose failures are one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (Exception, KeyboardInterrupt) as error:
            code = report(error, "--json" in sys.argv)
            if code is None:
                raise
            raise typer.Exit(code) from None


app = typer.Typer(
    cls=_Commands,
    help="Builds engines from language models, and generates with them.",
    epilog=EXIT_CODES_HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich" if _IS_FANCY else None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_HOME = Path("~/.millrace")


def _show_version(is_asked: bool) -> None:
    if is_asked:
        from importlib.metadata import version

        typer.echo(f"millrace {version('millrace-server')}")
        raise typer.Exit


@app.callback()
def connection(
    is_version_asked: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_show_version, help="Show the version and exit."
        ),
    ] = False,
    tls_ca: Annotated[
        str,
        typer.Option(
            "--tls-ca",
            metavar="FILE",
            envvar="MILLRACE_CLI_TLS_CA",
            help="CA of the daemons' certificates; turns TLS on.",
        ),
    ] = "",
    tls_cert: Annotated[
        str,
        typer.Option(
            "--tls-cert",
            metavar="FILE",
            envvar="MILLRACE_CLI_TLS_CERT",
            help="Certificate to show, where daemons ask for one.",
        ),
    ] = "",
    tls_key: Annotated[
        str,
        typer.Option(
            "--tls-key", metavar="FILE", envvar="MILLRACE_CLI_TLS_KEY", help="Its private key."
        ),
    ] = "",
) -> None:
    """Builds engines from language models, and generates with them."""
    # Kept in the variables, where `connecting` finds them. The API key has no option: other users
    # of a machine can read command lines.
    for name, path in (("CA", tls_ca), ("CERT", tls_cert), ("KEY", tls_key)):
        if path:
            os.environ[f"MILLRACE_CLI_TLS_{name}"] = path


@app.command(
    rich_help_panel=MACHINE, epilog="Example: millrace up --model sample:smollm2-135m --quant int8"
)
def up(
    model: Annotated[
        str, typer.Option("--model", metavar="URI", help="Build this model, and serve it.")
    ] = "",
    quant: Quant = "int8",
    state: State = _HOME,
    compiler: Compiler = COMPILER,
    runtime: Runtime = RUNTIME,
    runtimes: Annotated[
        int,
        typer.Option(
            "--runtimes", metavar="N", min=1, help="Several: a fleet, its gateway at --runtime."
        ),
    ] = 1,
    metrics: Annotated[
        bool, typer.Option(help="Serve Prometheus metrics at ports 7611 and 7612.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Run the whole stack on this machine, in the foreground.

    Valkey, a compile daemon, and a runtime daemon or several behind a gateway. Ctrl-C stops it;
    what is being generated is finished first. Port 0 takes a free one. With --json one line with
    the addresses is printed once the stack is ready.
    """
    from millrace.cli.stack import Stack
    from millrace.cli.up import up as run

    stack = Stack(state.expanduser().resolve(), compiler, runtime, metrics, runtimes)
    run(stack, model, quant, as_json=as_json)


@app.command(
    rich_help_panel=ENGINES,
    epilog="Example: millrace build sample:smollm2-135m --arch cpu,sm_90 --quant int8",
)
def build(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A Hugging Face folder, a GGUF file, hf:org/name@revision, sample:smollm2-135m, "
            "or random:CONFIG.json?seed=N.",
        ),
    ],
    arch: Annotated[
        str,
        typer.Option(
            "--arch",
            "-a",
            metavar="ARCHS",
            help="cpu, sm_80, sm_90, ...; several with commas. auto: this machine's GPU, or cpu.",
        ),
    ] = "auto",
    quant: Quant = "",
    name: Annotated[
        str, typer.Option("--name", metavar="NAME", help="What runtimes call the model.")
    ] = "",
    keep: Annotated[
        str,
        typer.Option(
            "--keep", metavar="PATTERNS", help="Weights that stay in bf16: lm_head,layers.0.*"
        ),
    ] = "",
    calibration: Annotated[
        str,
        typer.Option(
            "--calibration",
            metavar="FILE",
            help="Text or .jsonl to calibrate and measure with; a small one is shipped.",
        ),
    ] = "",
    calibration_tokens: Annotated[
        int, typer.Option("--calibration-tokens", metavar="N", min=0, help="To look at; 0: 4096.")
    ] = 0,
    max_kl: Annotated[
        float,
        typer.Option(
            "--max-kl", metavar="N", min=0, help="Mean KL divergence allowed; 0: the default."
        ),
    ] = 0.0,
    max_perplexity_increase: Annotated[
        float,
        typer.Option(
            "--max-perplexity-increase",
            metavar="N",
            min=0,
            help="Allowed, as a share: 0.05; 0: the default.",
        ),
    ] = 0.0,
    auto_keep: Annotated[
        bool, typer.Option("--auto-keep", help="Beyond the limits keep more weights in bf16.")
    ] = False,
    skip_quality: Annotated[
        bool, typer.Option("--no-quality", help="Measure nothing, promise nothing.")
    ] = False,
    kv_cache: Annotated[
        str,
        typer.Option(
            "--kv-cache", metavar="fp8|int8", help="Keep keys and values in 8 bits: fp8 or int8."
        ),
    ] = "",
    probe_tokens: Annotated[
        int,
        typer.Option(
            "--probe-tokens",
            metavar="N",
            min=0,
            help="Longest context in which the quality report hides facts; 0: 1024.",
        ),
    ] = 0,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Do not wait for it.")] = False,
    compiler: Compiler = COMPILER,
    as_json: AsJson = False,
) -> None:
    """Build a model into engines, one per arch, and watch.

    Asking twice builds once.
    """
    from millrace.cli.building import build as run
    from millrace.cli.building import parse_keep, parse_quant
    from millrace.cli.connecting import client as connect
    from millrace.cli.machine import local_arch

    archs = [local_arch()] if arch == "auto" else [a.strip() for a in arch.split(",") if a.strip()]
    model = _daemon_path(model)
    scheme, group_size, named_kv_cache = parse_quant(quant)
    recipe: RecipeOptions = {
        "keep": parse_keep(keep),
        "calibration": _daemon_path(calibration),
        "calibration_tokens": calibration_tokens,
        "max_kl": max_kl,
        "max_perplexity_increase": max_perplexity_increase,
        "auto_keep": auto_keep,
        "skip_quality": skip_quality,
        "kv_cache": kv_cache or named_kv_cache,
        "probe_tokens": probe_tokens,
    }
    with connect(compiler) as client:
        run(client, model, archs, scheme, group_size, name, recipe, detach=detach, as_json=as_json)


@app.command(
    rich_help_panel=ENGINES, epilog="Example: millrace builds --json | jq .builds[0].state"
)
def builds(limit: Limit = 20, compiler: Compiler = COMPILER, as_json: AsJson = False) -> None:
    """List builds, newest first."""
    from millrace.cli.connecting import client as connect
    from millrace.cli.listing import show_builds

    with connect(compiler) as client:
        show_builds(client, limit, as_json)


@app.command(rich_help_panel=ENGINES, epilog="Example: millrace cancel 3f9a52c01b7d")
def cancel(
    build: Annotated[str, typer.Argument(metavar="BUILD", help="As `millrace builds` shows it.")],
    compiler: Compiler = COMPILER,
) -> None:
    """Cancel a build that has not ended."""
    from millrace.cli.connecting import client as connect
    from millrace.cli.listing import cancel_build

    with connect(compiler) as client:
        cancel_build(client, build)


@app.command(rich_help_panel=ENGINES, epilog="Example: millrace engines")
def engines(limit: Limit = 50, compiler: Compiler = COMPILER, as_json: AsJson = False) -> None:
    """List the engines in the store, newest first."""
    from millrace.cli.connecting import client as connect
    from millrace.cli.listing import show_engines

    with connect(compiler) as client:
        show_engines(client, limit, as_json)


@app.command(rich_help_panel=ENGINES, epilog="Example: millrace inspect 3f9a52 --graph")
def inspect(
    engine: Annotated[
        str, typer.Argument(metavar="ENGINE", help="Model name, engine name, or its first digits.")
    ],
    graph: Annotated[
        bool, typer.Option("--graph", help="Print the graph before and after the passes.")
    ] = False,
    quality: Annotated[
        bool, typer.Option("--quality", help="Show what quantizing cost, layer by layer.")
    ] = False,
    compiler: Compiler = COMPILER,
    as_json: AsJson = False,
) -> None:
    """Show what an engine is made of, or what quantizing it cost."""
    from millrace.cli.connecting import client as connect
    from millrace.cli.inspecting import inspect as run
    from millrace.cli.quality import show_quality

    with connect(compiler) as client:
        if quality:
            show_quality(client, engine, as_json=as_json)
        else:
            run(client, engine, with_graph=graph, as_json=as_json)


@app.command(rich_help_panel=GENERATING, epilog="Example: millrace load smollm2-135m")
def load(
    engine: Annotated[
        str, typer.Argument(metavar="ENGINE", help="Model name, engine name, or its first digits.")
    ],
    quant: Quant = "",
    compiler: Compiler = COMPILER,
    runtime: Runtime = RUNTIME,
    as_json: AsJson = False,
) -> None:
    """Have the runtime serve an engine.

    What it is generating is finished first.
    """
    from millrace.cli.connecting import client as connect
    from millrace.cli.loading import load as run

    with connect(compiler, runtime) as client:
        run(client, engine, quant, as_json=as_json)


@app.command(
    rich_help_panel=ENGINES,
    epilog="Example: millrace tune llama-3.1-8b --quant fp8 --store s3://models/engines",
)
def tune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model name, or its digest.")],
    quant: Quant = "int8",
    store: Annotated[
        str,
        typer.Option(
            "--store",
            metavar="STORE",
            envvar="MILLRACE_STORE",
            help="Where engines are; empty: the local stack's.",
        ),
    ] = "",
    compiler: Annotated[
        str,
        typer.Option(
            "--compiler", metavar="HOST:PORT", help="Pull from, and publish to, this daemon too."
        ),
    ] = "",
    state: State = _HOME,
    as_json: AsJson = False,
) -> None:
    """Measure an engine's kernels on this machine's GPU, and keep the record with the engine.

    Nothing is compiled: only what the engine holds is chosen from. The GPU has to be free: stop the
    runtime that serves on it.
    """
    from millrace.cli.tuning import program, require_gpu
    from millrace.cli.tuning import tune as run

    require_gpu()
    folder = store or str(state.expanduser().resolve() / "store")
    run(program(model, quant, folder, compiler), as_json=as_json)


@app.command(
    rich_help_panel=GENERATING,
    epilog='Example: millrace generate "Once upon a time" -m 64 -t 0.8 --seed 1',
)
def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue; -: stdin.")],
    is_chat: Annotated[
        bool, typer.Option("--chat", help="PROMPT is a message, for the chat template.")
    ] = False,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    samples: Annotated[
        int, typer.Option("--samples", metavar="N", min=1, help="Answers to draw.")
    ] = 1,
    stop: Stop = None,
    ignore_end: Annotated[bool, typer.Option("--ignore-end", help="Go on past the end.")] = False,
    timeout_s: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", min=0, help="Seconds; 0: none.")
    ] = 0.0,
    runtime: Runtime = RUNTIME,
    as_json: AsJson = False,
) -> None:
    """Continue a text, streamed; its speed goes to stderr."""
    from millrace.cli.connecting import client as connect
    from millrace.cli.generating import generate as run

    text = sys.stdin.read() if prompt == "-" else prompt
    options = _options(max_tokens, temperature, top_p, top_k, seed, stop)
    if samples > 1:
        options["n"] = samples
    if ignore_end:
        options["ignore_end_tokens"] = True
    if timeout_s:
        options["timeout_s"] = timeout_s
    with connect(runtime=runtime) as client:
        asked = [{"role": "user", "content": text}] if is_chat else text
        run(client, asked, options, as_json=as_json)  # type: ignore[arg-type]


@app.command(
    rich_help_panel=GENERATING, epilog='Example: millrace chat --system "Answer in one sentence."'
)
def chat(
    system: Annotated[
        str, typer.Option("--system", metavar="TEXT", help="What the model is told first.")
    ] = "",
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    runtime: Runtime = RUNTIME,
) -> None:
    """Talk with the model, through its own chat template."""
    from millrace.cli.connecting import client as connect
    from millrace.cli.generating import chat as run

    with connect(runtime=runtime) as client:
        run(client, system, _options(max_tokens, temperature, top_p, top_k, seed, None))


app.add_typer(bench_commands, rich_help_panel=GENERATING)
app.add_typer(fleet_commands)


@app.command(rich_help_panel=MACHINE, epilog="Example: millrace doctor")
def doctor(
    state: State = _HOME,
    redis_url: Annotated[
        str,
        typer.Option(
            "--redis-url",
            metavar="URL",
            envvar="MILLRACE_REDIS_URL",
            help="Redis to look for; empty: an embedded one.",
        ),
    ] = "",
    compiler: Compiler = COMPILER,
    runtime: Runtime = RUNTIME,
    as_json: AsJson = False,
) -> None:
    """Check this machine, and say how to fix what is missing."""
    from millrace.cli.doctor import doctor as run

    raise typer.Exit(
        run(compiler, runtime, redis_url, state.expanduser().resolve(), as_json=as_json)
    )


@app.command(rich_help_panel=MACHINE, epilog="Example: millrace health 127.0.0.1:7602")
def health(
    address: Annotated[str, typer.Argument(metavar="HOST:PORT")] = RUNTIME,
    answering: Annotated[
        bool, typer.Option("--answering", help="Do not ask that it serves already.")
    ] = False,
) -> None:
    """Ask a daemon whether it serves, for health checks."""
    from millrace.channels import is_serving
    from millrace.cli.connecting import security
    from millrace.cli.failures import UNAVAILABLE

    if not is_serving(address, 5.0, security()) and not answering:
        raise CommandFailed(f"{address} answers and does not serve now", UNAVAILABLE)


app.add_typer(security_commands)
app.add_typer(store_commands)


@app.command(rich_help_panel=MACHINE, epilog="Example: millrace demo --state .millrace")
def demo(
    question: Annotated[
        str, typer.Option("--question", metavar="TEXT", help="What is asked.")
    ] = "",
    model: Annotated[str, typer.Option("--model", metavar="URI")] = "sample:smollm2-135m",
    quant: Quant = "int8",
    state: State = _HOME,
) -> None:
    """Build a small real model, serve it, and stream an answer."""
    from millrace.cli.up import QUESTION
    from millrace.cli.up import demo as run

    run(state.expanduser().resolve(), model, quant, question or QUESTION)


def _daemon_path(text: str) -> str:
    """`text`, absolute where it is a path here: the daemon's working folder is not ours."""
    path = Path(text)
    return str(path.resolve()) if text and path.exists() else text


def _options(
    max_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int | None,
    stop: list[str] | None,
) -> "GenerateOptions":
    options: GenerateOptions = {"max_new_tokens": max_tokens, "temperature": temperature}
    if top_p != 1.0:
        options["top_p"] = top_p
    if top_k:
        options["top_k"] = top_k
    if seed is not None:
        options["seed"] = seed
    if stop:
        options["stop"] = stop
    return options
