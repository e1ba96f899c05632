"""`millrace delete`: takes an engine out of the store."""

from millrace.cli import output
from millrace.cli.listing import quant_text
from millrace.cli.loading import find_engine
from millrace.client import Client


def delete_engine(client: Client, name: str, quant: str, *, as_json: bool) -> None:
    """Deletes the engine that `name` means from the store, and prints which one it was.

    Raises:
        CommandFailed: there is none, or there are several that differ in arch or quant.
    """
    engine = find_engine(client, name, quant)
    client.delete_engine(engine.name)
    if as_json:
        output.print_json(output.to_dict(engine))
        return
    key = engine.key
    output.print_line(
        f"deleted {output.short_name(engine.name)}  {engine.model}  {key.arch}  "
        f"{quant_text(key.quant)}"
    )
