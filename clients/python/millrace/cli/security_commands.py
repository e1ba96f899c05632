"""The commands of who may do what: certificates, API keys, signatures."""

from pathlib import Path
from typing import Annotated

import typer

from millrace.cli.options import COMPILER, SECURITY, AnyQuant, AsJson, Compiler

commands = typer.Typer()


@commands.command(
    rich_help_panel=SECURITY, epilog="Example: millrace certs deploy/tls --host runtime.example.org"
)
def certs(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Gets *.crt and *.key.")],
    host: Annotated[
        list[str] | None,
        typer.Option(
            "--host",
            metavar="HOST",
            help="Name or address of a server beside loopback; repeatable.",
        ),
    ] = None,
    client: Annotated[
        str, typer.Option("--client", metavar="NAME", help="The client's name.")
    ] = "client",
    days: Annotated[
        int, typer.Option("--days", metavar="N", min=1, help="How long they are valid.")
    ] = 90,
    as_json: AsJson = False,
) -> None:
    """Make a development CA, certificates and a signing key.

    A CA and a signing key that are in DIR are used again.
    """
    from millrace.cli.certs import make_certs

    make_certs(folder.expanduser(), host or (), client, days, as_json=as_json)


@commands.command(
    rich_help_panel=SECURITY, epilog="Example: millrace sign smollm2-135m --key tls/signing.key"
)
def sign(
    engine: Annotated[
        str, typer.Argument(metavar="ENGINE", help="Model name, engine name, or its first digits.")
    ],
    key: Annotated[Path, typer.Option("--key", metavar="FILE", help="Ed25519 private key, PEM.")],
    quant: AnyQuant = "",
    compiler: Compiler = COMPILER,
    as_json: AsJson = False,
) -> None:
    """Sign an engine, for runtimes that load signed ones alone."""
    from millrace.cli.connecting import client as connect
    from millrace.cli.signing import sign as run

    with connect(compiler) as client:
        run(client, engine, quant, key.expanduser(), as_json=as_json)


keys = typer.Typer(
    no_args_is_help=True,
    help="API keys: create, list, revoke.",
    epilog="Example: millrace keys create acme --scope generate",
)
commands.add_typer(keys, name="keys", rich_help_panel=SECURITY)
KeyFile = Annotated[
    Path,
    typer.Option(
        "--file", metavar="FILE", envvar="MILLRACE_API_KEYS", help="What daemons' --api-keys names."
    ),
]
_KEY_FILE = Path("~/.millrace/keys.json")


@keys.command("create", epilog="Example: millrace keys create acme --scope generate")
def create_key(
    tenant: Annotated[str, typer.Argument(metavar="TENANT", help="Who will use it.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(
            "--scope", metavar="SCOPE", help="generate, build, admin or delegate; repeatable."
        ),
    ] = None,
    requests_per_s: Annotated[
        float | None,
        typer.Option("--requests-per-s", metavar="N", min=0, help="The tenant's limit; 0: none."),
    ] = None,
    tokens_per_min: Annotated[
        int | None,
        typer.Option("--tokens-per-min", metavar="N", min=0, help="The tenant's limit; 0: none."),
    ] = None,
    concurrent: Annotated[
        int | None,
        typer.Option("--concurrent", metavar="N", min=0, help="Generations at once; 0: no limit."),
    ] = None,
    max_priority: Annotated[
        int | None,
        typer.Option(
            "--max-priority",
            metavar="N",
            min=0,
            max=100,
            help="Highest of its generations; 0 unless set.",
        ),
    ] = None,
    file: KeyFile = _KEY_FILE,
    as_json: AsJson = False,
) -> None:
    """Make a key and show it, this once.

    Limits are the tenant's, over all of its keys.
    """
    from millrace.cli.keys import create_key as run

    asked = {
        "requests_per_s": requests_per_s, "tokens_per_min": tokens_per_min,
        "concurrent": concurrent, "max_priority": max_priority,
    }  # fmt: skip
    limits = {name: value for name, value in asked.items() if value is not None}
    run(file.expanduser(), tenant, scope or ["generate"], limits, as_json=as_json)


@keys.command("list", epilog="Example: millrace keys list --json")
def list_keys(file: KeyFile = _KEY_FILE, as_json: AsJson = False) -> None:
    """List keys, their tenants, scopes and limits."""
    from millrace.cli.keys import list_keys as run

    run(file.expanduser(), as_json=as_json)


@keys.command("revoke", epilog="Example: millrace keys revoke 3f9a52c01b7d")
def revoke_key(
    key: Annotated[str, typer.Argument(metavar="ID", help="As `millrace keys list` shows it.")],
    file: KeyFile = _KEY_FILE,
    as_json: AsJson = False,
) -> None:
    """Make a key invalid; daemons know within a second."""
    from millrace.cli.keys import revoke_key as run

    run(file.expanduser(), key, as_json=as_json)
