"""The `millrace` command's interface: commands, their options, and nothing of what they do.

What a command does is imported when it runs, so that `--help` and shell completion are quick.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from millrace.cli.failures import EXIT_CODES_HELP, USAGE, CommandFailed, report

if TYPE_CHECKING:
    from millrace.generation import GenerateOptions

_IS_FANCY = sys.stdout.isatty() and "NO_COLOR" not in os.environ
_COMPILER, _RUNTIME, _GATEWAY = "127.0.0.1:7601", "127.0.0.1:7602", "127.0.0.1:7600"


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

Compiler = Annotated[
    str,
    typer.Option(
        "--compiler", metavar="HOST:PORT", envvar="MILLRACE_CLI_COMPILER", help="Compile daemon."
    ),
]
Runtime = Annotated[
    str,
    typer.Option(
        "--runtime", metavar="HOST:PORT", envvar="MILLRACE_CLI_RUNTIME", help="Runtime daemon."
    ),
]
Gateway = Annotated[
    str,
    typer.Option("--gateway", metavar="HOST:PORT", envvar="MILLRACE_CLI_GATEWAY", help="Gateway."),
]
State = Annotated[
    Path,
    typer.Option(
        "--state",
        metavar="FOLDER",
        envvar="MILLRACE_CLI_STATE",
        help="Where the local stack keeps engines, its queue and logs.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Quant = Annotated[
    str,
    typer.Option("--quant", "-q", metavar="SCHEME", help="bf16, fp32, int8, int4, int4-g128, fp8."),
]
Limit = Annotated[int, typer.Option("--limit", "-n", min=1, help="At most this many.")]
MaxTokens = Annotated[
    int, typer.Option("--max-tokens", "-m", min=0, help="Tokens to generate at most; 0: no limit.")
]
Temperature = Annotated[
    float, typer.Option("--temperature", "-t", min=0, help="0 picks the likeliest token.")
]
TopP = Annotated[float, typer.Option("--top-p", help="Keep the likeliest up to this probability.")]
TopK = Annotated[int, typer.Option("--top-k", min=0, help="Keep the k likeliest; 0: all.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Makes the answer repeatable.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="Text that ends it; repeatable.")]
_HOME = Path("~/.millrace")


@app.command(epilog="Example: millrace up --model sample:smollm2-135m --quant int8")
def up(
    model: Annotated[
        str, typer.Option("--model", metavar="URI", help="Build this model, and serve it.")
    ] = "",
    quant: Quant = "int8",
    state: State = _HOME,
    compiler: Compiler = _COMPILER,
    runtime: Runtime = _RUNTIME,
    runtimes: Annotated[
        int, typer.Option("--runtimes", min=1, help="Several: a fleet, its gateway at --runtime.")
    ] = 1,
    metrics: Annotated[
        bool, typer.Option(help="Serve Prometheus metrics at ports 7611 and 7612.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Run the local stack in the foreground: Valkey, a compile daemon, a runtime daemon.

    Ctrl-C stops it; what is being generated is finished first. Port 0 takes a free one. With
    --json one line with the addresses is printed once the stack is ready.
    """
    from millrace.cli.stack import Stack
    from millrace.cli.up import up as run

    stack = Stack(state.expanduser().resolve(), compiler, runtime, metrics, runtimes)
    run(stack, model, quant, as_json=as_json)


@app.command(epilog="Example: millrace build sample:smollm2-135m --arch cpu,sm_90 --quant int8")
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
            help="cpu, sm_80, sm_90, ...; several with commas. auto: this machine's GPU, or cpu.",
        ),
    ] = "auto",
    quant: Quant = "",
    name: Annotated[str, typer.Option("--name", help="What runtimes call the model.")] = "",
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Do not wait for it.")] = False,
    compiler: Compiler = _COMPILER,
    as_json: AsJson = False,
) -> None:
    """Build a model into engines, one per arch, and watch. Asking twice builds once."""
    from millrace.cli.building import build as run
    from millrace.cli.building import parse_quant
    from millrace.cli.machine import local_arch
    from millrace.client import Client

    archs = [local_arch()] if arch == "auto" else [a.strip() for a in arch.split(",") if a.strip()]
    path = Path(model)
    if path.exists():  # the daemon's working folder is not ours
        model = str(path.resolve())
    scheme, group_size = parse_quant(quant)
    with Client(compiler) as client:
        run(client, model, archs, scheme, group_size, name, detach=detach, as_json=as_json)


@app.command(epilog="Example: millrace builds --json | jq .builds[0].state")
def builds(limit: Limit = 20, compiler: Compiler = _COMPILER, as_json: AsJson = False) -> None:
    """List builds, newest first."""
    from millrace.cli.listing import show_builds
    from millrace.client import Client

    with Client(compiler) as client:
        show_builds(client, limit, as_json)


@app.command(epilog="Example: millrace cancel 3f9a52c01b7d")
def cancel(
    build: Annotated[str, typer.Argument(metavar="BUILD", help="As `millrace builds` shows it.")],
    compiler: Compiler = _COMPILER,
) -> None:
    """Cancel a build that has not ended."""
    from millrace.cli.listing import cancel_build
    from millrace.client import Client

    with Client(compiler) as client:
        cancel_build(client, build)


@app.command(epilog="Example: millrace engines")
def engines(limit: Limit = 50, compiler: Compiler = _COMPILER, as_json: AsJson = False) -> None:
    """List the engines in the store, newest first."""
    from millrace.cli.listing import show_engines
    from millrace.client import Client

    with Client(compiler) as client:
        show_engines(client, limit, as_json)


@app.command(epilog="Example: millrace inspect 3f9a52 --graph")
def inspect(
    engine: Annotated[
        str, typer.Argument(metavar="ENGINE", help="Model name, engine name, or its first digits.")
    ],
    graph: Annotated[
        bool, typer.Option("--graph", help="Print the graph before and after the passes.")
    ] = False,
    compiler: Compiler = _COMPILER,
    as_json: AsJson = False,
) -> None:
    """Show an engine: key, sizes, layers, graph, kernels, build times."""
    from millrace.cli.inspecting import inspect as run
    from millrace.client import Client

    with Client(compiler) as client:
        run(client, engine, with_graph=graph, as_json=as_json)


@app.command(epilog="Example: millrace load smollm2-135m")
def load(
    engine: Annotated[
        str, typer.Argument(metavar="ENGINE", help="Model name, engine name, or its first digits.")
    ],
    quant: Quant = "",
    compiler: Compiler = _COMPILER,
    runtime: Runtime = _RUNTIME,
    as_json: AsJson = False,
) -> None:
    """Have the runtime serve an engine; what it is generating is finished first."""
    from millrace.cli.loading import load as run
    from millrace.client import Client

    with Client(compiler, runtime) as client:
        run(client, engine, quant, as_json=as_json)


@app.command(epilog='Example: millrace generate "Once upon a time" -m 64 -t 0.8 --seed 1')
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
    samples: Annotated[int, typer.Option("--samples", min=1, help="Answers to draw.")] = 1,
    stop: Stop = None,
    ignore_end: Annotated[bool, typer.Option("--ignore-end", help="Go on past the end.")] = False,
    timeout_s: Annotated[float, typer.Option("--timeout", min=0, help="Seconds; 0: none.")] = 0.0,
    runtime: Runtime = _RUNTIME,
    as_json: AsJson = False,
) -> None:
    """Continue a text, streamed; its speed is told on stderr."""
    from millrace.cli.generating import generate as run
    from millrace.client import Client

    text = sys.stdin.read() if prompt == "-" else prompt
    options = _options(max_tokens, temperature, top_p, top_k, seed, stop)
    if samples > 1:
        options["n"] = samples
    if ignore_end:
        options["ignore_end_tokens"] = True
    if timeout_s:
        options["timeout_s"] = timeout_s
    with Client(runtime=runtime) as client:
        asked = [{"role": "user", "content": text}] if is_chat else text
        run(client, asked, options, as_json=as_json)  # type: ignore[arg-type]


@app.command(epilog='Example: millrace chat --system "Answer in one sentence."')
def chat(
    system: Annotated[str, typer.Option("--system", help="What the model is told first.")] = "",
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    runtime: Runtime = _RUNTIME,
) -> None:
    """Talk with the model, through its own chat template."""
    from millrace.cli.generating import chat as run
    from millrace.client import Client

    with Client(runtime=runtime) as client:
        run(client, system, _options(max_tokens, temperature, top_p, top_k, seed, None))


@app.command(epilog="Example: millrace bench --streams 16 --requests 64 --in 64 --out 128")
def bench(
    streams: Annotated[int, typer.Option("--streams", "-s", min=1, help="At once.")] = 8,
    calls: Annotated[int, typer.Option("--calls", min=1, help="gRPC calls they share.")] = 1,
    requests: Annotated[int, typer.Option("--requests", "-r", min=1, help="In all.")] = 32,
    input_tokens: Annotated[int, typer.Option("--in", min=1, help="Prompt tokens.")] = 64,
    output_tokens: Annotated[int, typer.Option("--out", min=1, help="Answer tokens.")] = 128,
    seed: Annotated[int, typer.Option("--seed", help="Of the random prompts.")] = 0,
    runtime: Runtime = _RUNTIME,
    as_json: AsJson = False,
) -> None:
    """Measure a runtime under a constant number of streams."""
    from millrace.cli.bench import Load
    from millrace.cli.bench import bench as run

    if calls > streams:
        raise CommandFailed("--calls is at most --streams: every call carries a stream", USAGE)
    load_to_send = Load(streams, calls, requests, input_tokens, output_tokens, seed)
    run(runtime, load_to_send, as_json=as_json)


@app.command(epilog="Example: millrace deploy chat --model smollm2-135m --quant int8 --replicas 2")
def deploy(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What requests call it.")],
    model: Annotated[str, typer.Option("--model", metavar="MODEL", help="Model name or digest.")],
    quant: Quant = "int8",
    replicas: Annotated[int, typer.Option("--replicas", min=1, help="Runtimes to serve it.")] = 1,
    model_uri: Annotated[
        str, typer.Option("--model-uri", metavar="URI", help="Built from, where it is missing.")
    ] = "",
    wait_s: Annotated[
        float, typer.Option("--wait", min=0, help="Seconds to wait until all are ready; 0: none.")
    ] = 0.0,
    gateway: Gateway = _GATEWAY,
    as_json: AsJson = False,
) -> None:
    """Say what a number of runtimes are to serve; they follow without losing a generation."""
    from millrace.cli.fleet import deploy as run
    from millrace.cli.fleet import show_deployment
    from millrace.fleet_client import FleetClient

    with FleetClient(gateway) as fleet:
        deployment = run(fleet, name, model, quant, model_uri, replicas, wait_s=wait_s)
    show_deployment(deployment, as_json=as_json)


@app.command(epilog="Example: millrace undeploy chat")
def undeploy(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As `millrace status` shows it.")],
    gateway: Gateway = _GATEWAY,
) -> None:
    """End a deployment; its runtimes finish what they have and become idle."""
    from millrace.cli.output import print_line
    from millrace.fleet_client import FleetClient

    with FleetClient(gateway) as fleet:
        fleet.undeploy(name)
    print_line(f"{name} is undeployed")


@app.command(epilog="Example: millrace status --watch")
def status(
    watch: Annotated[bool, typer.Option("--watch", help="As `millrace top`.")] = False,
    gateway: Gateway = _GATEWAY,
    compiler: Compiler = _COMPILER,
    as_json: AsJson = False,
) -> None:
    """Show the fleet behind a gateway: runtimes, their load, deployments."""
    if watch:
        top(gateway, compiler)
        return
    from millrace.cli.fleet import show_status
    from millrace.fleet_client import FleetClient

    with FleetClient(gateway) as fleet:
        show_status(fleet, as_json=as_json)


@app.command(epilog="Example: millrace top")
def top(gateway: Gateway = _GATEWAY, compiler: Compiler = _COMPILER) -> None:
    """Watch the fleet on the whole screen: load, KV use, tokens/s, TTFT, builds."""
    from millrace.cli.fleet import watch_status
    from millrace.client import Client
    from millrace.fleet_client import FleetClient

    with FleetClient(gateway) as fleet, Client(compiler) as client:
        watch_status(fleet, client)


@app.command(epilog="Example: millrace doctor")
def doctor(
    state: State = _HOME,
    redis_url: Annotated[
        str, typer.Option("--redis-url", envvar="MILLRACE_REDIS_URL", help="Empty: embedded.")
    ] = "",
    compiler: Compiler = _COMPILER,
    runtime: Runtime = _RUNTIME,
    as_json: AsJson = False,
) -> None:
    """Look at this machine, a line each, with the fix for what lacks."""
    from millrace.cli.doctor import doctor as run

    raise typer.Exit(
        run(compiler, runtime, redis_url, state.expanduser().resolve(), as_json=as_json)
    )


@app.command(epilog="Example: millrace health 127.0.0.1:7602")
def health(
    address: Annotated[str, typer.Argument(metavar="HOST:PORT")] = _RUNTIME,
    answering: Annotated[
        bool, typer.Option("--answering", help="Do not ask that it serves already.")
    ] = False,
) -> None:
    """Ask a daemon whether it serves: for container health checks."""
    from millrace.channels import is_serving
    from millrace.cli.failures import UNAVAILABLE

    if not is_serving(address, timeout_s=5.0) and not answering:
        raise CommandFailed(f"{address} answers and does not serve now", UNAVAILABLE)


@app.command(epilog="Example: millrace demo --state .millrace")
def demo(
    question: Annotated[str, typer.Option("--question", help="What is asked.")] = "",
    model: Annotated[str, typer.Option("--model", metavar="URI")] = "sample:smollm2-135m",
    quant: Quant = "int8",
    state: State = _HOME,
) -> None:
    """Build a small real model, serve it, and stream an answer: the whole product, once."""
    from millrace.cli.up import QUESTION
    from millrace.cli.up import demo as run

    run(state.expanduser().resolve(), model, quant, question or QUESTION)


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
