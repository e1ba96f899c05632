"""`millrace-runtime`: starts the process that will be the engine, then is the daemon.

Nothing of the daemon is imported at the head: the engine process's imports take longest, and begin first.
"""

from runtime_service.engine_interpreter import EngineInterpreter
from shared.process import end_at_signals, keep_bytecode, quiet_grpc

# Imports what every engine needs, torch above all.
_AHEAD = "runtime_service.execution.loader:import_ahead"


def main() -> None:
    """Runs the daemon."""
    end_at_signals()
    quiet_grpc()
    with EngineInterpreter(_AHEAD) as waiting:
        keep_bytecode("torch")
        from runtime_service.daemon import run

        run(waiting)


if __name__ == "__main__":
    main()
