"""`millrace-compiler`: can be ended, and is then the daemon, whose imports take longest."""

from shared.process import end_at_signals, quiet_grpc


def main() -> None:
    """Runs the compile daemon."""
    end_at_signals()
    quiet_grpc()
    from compiler_service.starting import run

    run()


if __name__ == "__main__":
    main()
