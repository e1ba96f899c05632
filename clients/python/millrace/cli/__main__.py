"""Runs the `millrace` command."""

import os

from millrace.cli.app import app


def main() -> None:
    """Entry point of the command."""
    # A failure is one line, which says what gRPC's core would say too.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    if "_MILLRACE_COMPLETE" in os.environ:  # a shell asks, by the script of `millrace completion`
        from typer.completion import completion_init  # type: ignore[attr-defined]

        completion_init()
    app(prog_name="millrace")


if __name__ == "__main__":
    main()
