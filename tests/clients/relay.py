"""A TCP relay before a server, whose connections can be lost: what a broken network is to a client."""

import fcntl
import os
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

# A connection is cut when nothing has passed for so long, and nobody has anything to do with what has.
_QUIET_S = 0.1


class Relay:
    """Passes bytes between clients and `target`, both on loopback, until it is told to cut.

    Args:
        rests: claims that the client has taken in what has arrived: it may drop the rest with the connection.
    """

    def __init__(self, target_port: int, rests: Callable[[], bool] = lambda: True) -> None:
        self._target_port, self._rests = target_port, rests
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._last_passed_s = time.monotonic()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, for_good: bool = False) -> None:
        """Loses all connections once they are quiet; `for_good` takes no others."""
        if for_good:
            self._stop_listening()
        while (left_s := self._quiet_in_s()) > 0 or not self._have_arrived():
            time.sleep(max(left_s, 0.001))
        self.lose()

    def close(self) -> None:
        """Ends everything."""
        self._stop_listening()
        self.lose()

    def _stop_listening(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes `accept`
        self._listener.close()

    def lose(self) -> None:
        """Loses all connections at once, with what they carry."""
        with self._lock:
            sockets, self._sockets = self._sockets, set()
        for connection in sockets:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _quiet_in_s(self) -> float:
        return self._last_passed_s + _QUIET_S - time.monotonic()

    def _have_arrived(self) -> bool:
        """Claims that nothing is under way: in the server, which this process is, here, or in the client."""
        with self._lock:
            has_more = any(_num_unread(connection) for connection in self._sockets)
        here = threading.get_native_id()
        return not has_more and has_nothing_to_do(os.getpid(), but=here) and self._rests()

    def _accept(self) -> None:
        with suppress(OSError):  # it is closed
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target_port))
                with self._lock:
                    self._sockets |= {client, server}
                for source, sink in ((client, server), (server, client)):
                    source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):  # either end is gone
            while data := source.recv(1 << 16):
                sink.sendall(data)
                self._last_passed_s = time.monotonic()
        with self._lock:
            self._sockets -= {source, sink}
        for connection in (source, sink):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def has_nothing_to_do(pid: int, but: int = 0) -> bool:
    """Claims that all threads of a process wait, but for one; one that only lacks a processor does not wait."""
    try:
        # Source: proc(5), stat: the third field, after a name in parentheses, is S where a thread waits.
        return all(
            path.read_text().rpartition(") ")[2].startswith("S")
            for path in Path(f"/proc/{pid}/task").glob("*/stat")
            if path.parent.name != str(but)
        )
    except (FileNotFoundError, ProcessLookupError):  # a thread has just ended
        return False


def _num_unread(connection: socket.socket) -> int:
    """Bytes that have come and were not received."""
    found: tuple[int] = struct.unpack("i", fcntl.ioctl(connection, termios.FIONREAD, b"\0" * 4))
    return found[0]
