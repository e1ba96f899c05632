"""The commands of a fleet: what it is to serve, and how it stands."""

from typing import Annotated

import typer

from millrace.cli.options import COMPILER, FLEET, GATEWAY, AsJson, Compiler, Gateway, Quant

commands = typer.Typer()


@commands.command(
    rich_help_panel=FLEET,
    epilog="Example: millrace deploy chat --model smollm2-135m --quant int8 --replicas 2",
)
def deploy(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What requests call it.")],
    model: Annotated[str, typer.Option("--model", metavar="MODEL", help="Model name or digest.")],
    quant: Quant = "int8",
    replicas: Annotated[
        int, typer.Option("--replicas", metavar="N", min=1, help="How many runtimes serve it.")
    ] = 1,
    model_uri: Annotated[
        str,
        typer.Option(
            "--model-uri", metavar="URI", help="Checkpoint to build from, where no engine is there."
        ),
    ] = "",
    wait_s: Annotated[
        float,
        typer.Option(
            "--wait",
            metavar="SECONDS",
            min=0,
            help="Wait at most this long until all are ready; 0: do not wait.",
        ),
    ] = 0.0,
    gateway: Gateway = GATEWAY,
    as_json: AsJson = False,
) -> None:
    """Say what a number of runtimes are to serve.

    They follow one by one, without losing a generation.
    """
    from millrace.cli.connecting import fleet_client
    from millrace.cli.fleet import deploy as run
    from millrace.cli.fleet import show_deployment

    with fleet_client(gateway) as fleet:
        deployment = run(fleet, name, model, quant, model_uri, replicas, wait_s=wait_s)
    show_deployment(deployment, as_json=as_json)


@commands.command(rich_help_panel=FLEET, epilog="Example: millrace undeploy chat")
def undeploy(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As `millrace status` shows it.")],
    gateway: Gateway = GATEWAY,
    as_json: AsJson = False,
) -> None:
    """End a deployment; its runtimes finish what they run."""
    from millrace.cli.connecting import fleet_client
    from millrace.cli.fleet import undeploy as run

    with fleet_client(gateway) as fleet:
        run(fleet, name, as_json=as_json)


@commands.command(rich_help_panel=FLEET, epilog="Example: millrace status --watch")
def status(
    watch: Annotated[bool, typer.Option("--watch", help="As `millrace top`.")] = False,
    gateway: Gateway = GATEWAY,
    compiler: Compiler = COMPILER,
    as_json: AsJson = False,
) -> None:
    """Show the runtimes behind a gateway, and deployments."""
    if watch:
        top(gateway, compiler)
        return
    from millrace.cli.connecting import fleet_client
    from millrace.cli.fleet import show_status

    with fleet_client(gateway) as fleet:
        show_status(fleet, as_json=as_json)


@commands.command(rich_help_panel=FLEET, epilog="Example: millrace top")
def top(gateway: Gateway = GATEWAY, compiler: Compiler = COMPILER) -> None:
    """Watch runtimes, deployments and builds, on the whole screen.

    In parentheses stand the tokens of the prompts that wait; narrow screens leave columns out.
    """
    from millrace.cli.connecting import client, fleet_client
    from millrace.cli.fleet import watch_status

    with fleet_client(gateway) as fleet, client(compiler) as builds:
        watch_status(fleet, builds)
