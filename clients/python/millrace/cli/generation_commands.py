"""The commands that generate with a runtime, and that choose what it serves."""

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from millrace.cli.failures import USAGE, CommandFailed
from millrace.cli.options import (
    COMPILER,
    GENERATING,
    RUNTIME,
    AnyQuant,
    AsJson,
    Compiler,
    MaxTokens,
    Runtime,
    Seed,
    Stop,
    Temperature,
    Template,
    TopK,
    TopP,
)

if TYPE_CHECKING:
    from millrace.generation import GenerateOptions

commands = typer.Typer()


@commands.command(rich_help_panel=GENERATING, epilog="Example: millrace load smollm2-135m")
def load(
    engine: Annotated[
        str, typer.Argument(metavar="ENGINE", help="Model name, engine name, or its first digits.")
    ],
    quant: AnyQuant = "",
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


@commands.command(
    rich_help_panel=GENERATING,
    epilog='Example: millrace generate "Once upon a time" -m 64 -t 0.8 --seed 1',
)
def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue; -: stdin.")],
    is_chat: Annotated[
        bool, typer.Option("--chat", help="PROMPT is a message, for the chat template.")
    ] = False,
    template: Template = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    samples: Annotated[
        int, typer.Option("--samples", metavar="N", min=1, help="How many answers.")
    ] = 1,
    stop: Stop = None,
    ignore_end: Annotated[
        bool, typer.Option("--ignore-end", help="Go on past the model's end token.")
    ] = False,
    timeout_s: Annotated[
        float,
        typer.Option(
            "--timeout", metavar="SECONDS", min=0, help="Give up after this long; 0: never."
        ),
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
    if template:
        options["template_arguments"] = _template_arguments(template)
    with connect(runtime=runtime) as client:
        asked = [{"role": "user", "content": text}] if is_chat else text
        run(client, asked, options, as_json=as_json)


@commands.command(
    rich_help_panel=GENERATING, epilog='Example: millrace chat --system "Answer in one sentence."'
)
def chat(
    system: Annotated[
        str, typer.Option("--system", metavar="TEXT", help="What the model is told first.")
    ] = "",
    template: Template = None,
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

    options = _options(max_tokens, temperature, top_p, top_k, seed, None)
    if template:
        options["template_arguments"] = _template_arguments(template)
    with connect(runtime=runtime) as client:
        run(client, system, options)


def _template_arguments(given: list[str]) -> dict[str, object]:
    arguments: dict[str, object] = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not (name and equals):
            raise CommandFailed(f"--template must be NAME=VALUE, found {one!r}", USAGE)
        try:
            arguments[name] = json.loads(value)
        except ValueError:  # no JSON is a text that nobody has to quote twice
            arguments[name] = value
        except RecursionError:
            problem = f"--template {name}: its value is nested too deeply"
            raise CommandFailed(problem, USAGE) from None
    return arguments


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
