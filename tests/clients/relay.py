"""A TCP relay before a server, whose connections can be lost: what a broken network is to a client."""

import fcntl
import socket
import struct
import termios
import threading
import time
from contextlib import suppress

# A connection is cut when nothing has passed for so long: what was sent before has arrived.
_QUIET_S = 0.1


class Relay:
    """Passes bytes between clients and `target`, both on loopback, until it is told to cut."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
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
        while (left_s := self._last_passed_s + _QUIET_S - time.monotonic()) > 0 or self._has_more():
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

    def _has_more(self) -> bool:
        """Claims that something has come that is not passed on yet."""
        with self._lock:
            return any(_num_unread(connection) for connection in self._sockets)

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


def _num_unread(connection: socket.socket) -> int:
    """Bytes that have come and were not received."""
    found: tuple[int] = struct.unpack("i", fcntl.ioctl(connection, termios.FIONREAD, b"\0" * 4))
    return found[0]
