"""The commands of a store: what is done to one where it lies."""

from typing import Annotated

import typer

from millrace.cli.options import ENGINES, AsJson

commands = typer.Typer()
store = typer.Typer(
    no_args_is_help=True,
    help="Stores of engines: sweep.",
    epilog="Example: millrace store sweep s3://models/engines",
)
commands.add_typer(store, name="store", rich_help_panel=ENGINES)


@store.command(epilog="Example: millrace store sweep s3://models/engines")
def sweep(
    url: Annotated[
        str,
        typer.Argument(metavar="STORE", help="A folder or s3://bucket/prefix, as daemons name it."),
    ],
    as_json: AsJson = False,
) -> None:
    """Free what deleted engines and broken pushes have left in a store.

    What was written or used by a push in the last 24 hours stays, so daemons may go on meanwhile.
    """
    from millrace.cli.storing import sweep as run

    run(url, as_json=as_json)
