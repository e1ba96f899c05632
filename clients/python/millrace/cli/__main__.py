"""Runs the `millrace` command."""

from millrace.cli.app import app


def main() -> None:
    """Entry point of the command."""
    app(prog_name="millrace")


if __name__ == "__main__":
    main()
