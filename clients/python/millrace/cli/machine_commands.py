"""The commands of this machine: the local stack, and what daemons and machine lack."""

from enum import StrEnum
from typing import Annotated

import typer

from millrace.cli.failures import CommandFailed
from millrace.cli.options import (
    COMPILER,
    GATEWAY,
    HOME,
    MACHINE,
    RUNTIME,
    AsJson,
    Compiler,
    Gateway,
    Quant,
    Runtime,
    State,
)

commands = typer.Typer()


@commands.command(
    rich_help_panel=MACHINE, epilog="Example: millrace up --model sample:smollm2-135m --quant int8"
)
def up(
    model: Annotated[
        str, typer.Option("--model", metavar="URI", help="Build this model, and serve it.")
    ] = "",
    quant: Quant = "int8",
    state: State = HOME,
    compiler: Compiler = COMPILER,
    runtime: Runtime = RUNTIME,
    runtimes: Annotated[
        int,
        typer.Option(
            "--runtimes", metavar="N", min=1, help="Several: a fleet, with a gateway in front."
        ),
    ] = 1,
    gateway: Gateway = GATEWAY,
    metrics: Annotated[
        bool, typer.Option(help="Serve metrics at ports 7610 to 7612, and a fleet's HTTP at 7620.")
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

    stack = Stack(state.expanduser().resolve(), compiler, runtime, gateway, metrics, runtimes)
    run(stack, model, quant, as_json=as_json)


@commands.command(rich_help_panel=MACHINE, epilog="Example: millrace demo --state .millrace")
def demo(
    question: Annotated[
        str, typer.Option("--question", metavar="TEXT", help="What is asked.")
    ] = "",
    model: Annotated[
        str, typer.Option("--model", metavar="URI", help="What is built.")
    ] = "sample:smollm2-135m",
    quant: Quant = "int8",
    state: State = HOME,
) -> None:
    """Build a small real model, serve it, and stream an answer."""
    from millrace.cli.up import QUESTION
    from millrace.cli.up import demo as run

    run(state.expanduser().resolve(), model, quant, question or QUESTION)


@commands.command(rich_help_panel=MACHINE, epilog="Example: millrace doctor")
def doctor(
    state: State = HOME,
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


class Shell(StrEnum):
    """Shells that complete."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


@commands.command(rich_help_panel=MACHINE, epilog="Example: millrace completion bash >> ~/.bashrc")
def completion(
    shell: Annotated[Shell, typer.Argument(metavar="SHELL", help="bash, zsh or fish.")],
) -> None:
    """Print a script that has a shell complete commands and options."""
    from typer.completion import get_completion_script  # type: ignore[attr-defined]

    script = get_completion_script(
        prog_name="millrace", complete_var="_MILLRACE_COMPLETE", shell=shell.value
    )
    typer.echo(script)


@commands.command(rich_help_panel=MACHINE, epilog="Example: millrace health 127.0.0.1:7602")
def health(
    address: Annotated[
        str,
        typer.Argument(
            metavar="HOST:PORT", envvar="MILLRACE_CLI_RUNTIME", help="A daemon of any kind."
        ),
    ] = RUNTIME,
    answering: Annotated[
        bool, typer.Option("--answering", help="An answer is enough, serving or not.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Ask a daemon whether it serves, for health checks."""
    from millrace.channels import is_serving
    from millrace.cli.connecting import checked, security
    from millrace.cli.failures import UNAVAILABLE
    from millrace.cli.output import print_json

    serves = is_serving(checked(address), 5.0, security())
    if not serves and not answering:
        raise CommandFailed(f"{address} answers and does not serve now", UNAVAILABLE)
    if as_json:
        print_json({"address": address, "is_serving": serves})
