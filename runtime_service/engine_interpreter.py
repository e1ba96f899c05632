"""The interpreter that becomes an engine process, and its socket; apart from what speaks with it.

So it imports next to nothing: a daemon starts one before it imports anything else of its own.
"""

import os
import socket
import subprocess
import sys
from typing import Self

# A step's outputs for thousands of sequences fit, so that the loop does not wait for the front.
SOCKET_BUFFER_BYTES = 8 << 20


class EngineInterpreter:
    """A fresh interpreter that waits for its `EngineSpec`; nobody else's threads or gRPC state are in it.

    It has its own session, so that a terminal's Ctrl-C reaches the front alone. It dies with the front: the
    kernel kills it, and its socket closes. As a context manager it ends with the block, unless it was taken.
    Start it from the main thread: the kernel ties the child's life to the thread that started it.

    Args:
        ahead: `module:function` that it runs in a thread while it waits; "" = none.
    Raises:
        OSError: the system gives no process or socket.
    """

    def __init__(self, ahead: str = "") -> None:
        self._is_taken = False
        self.front, engine = socket_pair()
        command = [sys.executable, "-m", "runtime_service.engine_main"]
        try:
            with engine:
                self.process = subprocess.Popen(
                    [*command, str(engine.fileno()), str(os.getpid()), ahead],
                    pass_fds=[engine.fileno()],
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
        except BaseException:
            self.front.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._is_taken:
            self.end()

    def take(self) -> bool:
        """Claims it for one engine, which owns it from now on; false where it was taken, or has died."""
        is_free = not self._is_taken and self.process.poll() is None
        self._is_taken = self._is_taken or is_free
        return is_free

    def end(self) -> None:
        """Kills and reaps it."""
        self.front.close()
        self.process.kill()
        self.process.wait()


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected ends: the front's, and the engine's to be inherited."""
    front, engine = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for end in (front, engine):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
    return front, engine
