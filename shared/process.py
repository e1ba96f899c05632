"""The beginnings of a process: its age, its bytecode, how it ends before it can drain, and what children do first.

Run as a program, it becomes the program in its arguments; it then imports nothing of the house.
"""

import contextlib
import ctypes
import importlib.util
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1
_BYTECODE = "~/.cache/millrace/bytecode"
# How long what is open may take to close.
_END_S = 3.0


def process_age_s() -> float:
    """Seconds since this process was started, by the kernel's clock; 0 where it does not tell (it is not Linux).

    Source: proc(5), field 22 of /proc/pid/stat.
    """
    try:
        with open("/proc/self/stat", encoding="ascii") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:  # there is no /proc
        return 0.0
    started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return max(time.clock_gettime(time.CLOCK_BOOTTIME) - started_s, 0.0)


def end_at_signals() -> None:
    """Has SIGTERM and SIGINT end this process from now on, until a server that drains takes them over.

    Call it before anything else: as PID 1, which it is in a container, a process that handles no signal is sent none,
    and a daemon imports for a second before it can drain. Its exit status is a shell's, 128 and the signal's number.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)


def quiet_grpc() -> None:
    """Has gRPC's core write nothing, unless its own variable says otherwise: its lines are none of the log's.

    Call it before gRPC is imported. What connections and handshakes met is told by whoever asked for them.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def _end(number: int, _: object) -> None:
    # What was opened is closed on the way out; a thread that waits for the network does not hold it up.
    late = threading.Timer(_END_S, os._exit, (128 + number,))
    late.daemon = True
    late.start()
    raise SystemExit(128 + number)


def end_with_parent(parent: int, signal_number: int) -> None:
    """Has this process signalled when the thread that started it ends, on Linux.

    Args:
        parent: the starting process, whose end may come before the call.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal_number, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal_number)


def ending_with_parent(command: Sequence[str]) -> list[str]:
    """A command that runs `command` and has it terminated when this process ends.

    A `preexec_fn` would run Python between fork and exec, where gRPC's threads hold locks.

    Args:
        command: an absolute path, and arguments.
    """
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]


def keep_bytecode(package: str) -> None:
    """Has Python keep what it compiles from now on in `~/.cache/millrace`, if nothing keeps it beside the sources.

    Some installers compile nothing, and images set PYTHONDONTWRITEBYTECODE or are read-only: then every start would
    compile all sources again, of torch for 3 s. Where PYTHONPYCACHEPREFIX is set, Python does as it says.

    Args:
        package: the one whose bytecode is looked for; it is not imported.
    """
    spec = importlib.util.find_spec(package)
    if sys.pycache_prefix or spec is None or spec.cached is None or os.path.exists(spec.cached):
        return
    if not sys.dont_write_bytecode and os.access(os.path.dirname(spec.origin or ""), os.W_OK):
        return  # the first import leaves it there
    folder = os.path.expanduser(_BYTECODE)
    with contextlib.suppress(OSError):  # there is no home to write to: every start compiles
        os.makedirs(folder, mode=0o700, exist_ok=True)
        sys.pycache_prefix, sys.dont_write_bytecode = folder, False


def share_openmp() -> None:
    """Has torch and Numba use the system's OpenMP library, one pool of threads for both; before torch is imported.

    torch brings a copy and takes one that is loaded already; Numba knows the system's alone.
    """
    with contextlib.suppress(OSError):  # none is installed: Numba uses threads of its own
        ctypes.CDLL("libgomp.so.1")


if __name__ == "__main__":
    end_with_parent(int(sys.argv[1]), signal.SIGTERM)
    os.execv(sys.argv[2], sys.argv[2:])
