"""The `millrace` command. Its commands stand in `*_commands.py`: their options, and nothing of what they do.

What a command does is imported when it runs, so that `--help` and shell completion are quick.
"""

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from millrace.cli.bench_commands import commands as bench_commands
from millrace.cli.engine_commands import commands as engine_commands
from millrace.cli.failures import EXIT_CODES_HELP, report
from millrace.cli.fleet_commands import commands as fleet_commands
from millrace.cli.generation_commands import commands as generation_commands
from millrace.cli.machine_commands import commands as machine_commands
from millrace.cli.options import GENERATING, IS_JSON
from millrace.cli.security_commands import commands as security_commands
from millrace.cli.store_commands import commands as store_commands

_IS_FANCY = sys.stdout.isatty() and "NO_COLOR" not in os.environ


class _Commands(TyperGroup):
    """Commands whose failures are one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (Exception, KeyboardInterrupt) as error:
            code = report(error, as_json=ctx.meta.get(IS_JSON, False))
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


app.add_typer(machine_commands)
app.add_typer(engine_commands)
app.add_typer(generation_commands)
app.add_typer(bench_commands, rich_help_panel=GENERATING)
app.add_typer(fleet_commands)
app.add_typer(security_commands)
app.add_typer(store_commands)
