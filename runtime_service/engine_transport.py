"""How the front process and the engine process exchange messages: frames on a socket pair.

    frame               4 bytes, little endian: length of the rest; then the rest
    front -> engine     first one frame of the caller's bytes (what to load), then frames that are
                        each a list of commands
    engine -> front     frames that are each one reply: `Ready`, then one `StepOutputs` a step

Both sides batch: a frame carries all that gathered since the last one. The engine's side blocks,
the front's side is asyncio. Either end sees `PeerGone` when the other process is no more.
"""

import asyncio
import socket
import struct
import time
from contextlib import suppress

import msgspec

from runtime_service.engine_interpreter import SOCKET_BUFFER_BYTES
from runtime_service.engine_messages import Command, Reply

_RECEIVE_BYTES = 1 << 20
_LENGTH = struct.Struct("<I")
# So long a front may take to read the last reply.
_LINGER_S = 2.0


class PeerGone(Exception):
    """The process at the other end has closed its side or died."""


class EngineSide:
    """The engine process's end; owns `sock`."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)
        self._socket = sock
        self._buffer = bytearray()
        self._decoder = msgspec.msgpack.Decoder(list[Command])
        self._encoder = msgspec.msgpack.Encoder()

    def receive_bytes(self) -> bytes:
        """The next frame as it came; waits for it.

        Raises:
            PeerGone: the front is no more.
        """
        while (frame := self._take_frame()) is None:
            self._read(wait=True)
        return frame

    def receive(self, wait: bool) -> list[Command]:
        """All commands that have arrived, in order; where `wait`, at least one.

        Raises:
            PeerGone: the front is no more.
        """
        while self._read(wait=False):
            pass
        commands = self._take_commands()
        while wait and not commands:
            self._read(wait=True)
            commands = self._take_commands()
        return commands

    def send(self, reply: Reply) -> None:
        """Sends one reply; waits only while the front is megabytes behind.

        Raises:
            PeerGone: the front is no more.
        """
        body = self._encoder.encode(reply)
        try:
            self._socket.sendall(_LENGTH.pack(len(body)) + body)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise PeerGone from error

    def send_last(self, reply: Reply) -> None:
        """Sends a reply that nothing follows, and waits until the front has closed its end, or for 2 s.

        What the front still sends is dropped: to write to a process that is gone breaks its connection, and what it has
        not read by then would be lost.

        Raises:
            PeerGone: the front is no more.
        """
        self.send(reply)
        until_s = time.monotonic() + _LINGER_S
        with suppress(OSError):  # the front is no more, or takes its time
            self._socket.shutdown(socket.SHUT_WR)
            while (left_s := until_s - time.monotonic()) > 0:
                self._socket.settimeout(left_s)
                if not self._socket.recv(_RECEIVE_BYTES):
                    return

    def _read(self, wait: bool) -> bool:
        flags = 0 if wait else socket.MSG_DONTWAIT
        try:
            data = self._socket.recv(_RECEIVE_BYTES, flags)
        except BlockingIOError:  # nothing more has arrived
            return False
        except ConnectionResetError as error:
            raise PeerGone from error
        if not data:
            raise PeerGone
        self._buffer += data
        return True

    def _take_commands(self) -> list[Command]:
        commands: list[Command] = []
        while (frame := self._take_frame()) is not None:
            commands += self._decoder.decode(frame)
        return commands

    def _take_frame(self) -> bytes | None:
        buffer = self._buffer
        if len(buffer) < _LENGTH.size:
            return None
        end = _LENGTH.size + _LENGTH.unpack_from(buffer)[0]
        if len(buffer) < end:
            return None
        frame = bytes(buffer[_LENGTH.size : end])
        del buffer[:end]
        return frame


class FrontSide:
    """The front process's end; made by `open`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
        self._encoder = msgspec.msgpack.Encoder()

    @classmethod
    async def open(cls, sock: socket.socket) -> "FrontSide":
        """The end at `sock`, which it owns from now on."""
        sock.setblocking(False)
        reader, writer = await asyncio.open_unix_connection(sock=sock, limit=SOCKET_BUFFER_BYTES)
        return cls(reader, writer)

    def send_bytes(self, frame: bytes) -> None:
        """Queues one frame; never waits. Sending to a process that is gone does nothing."""
        self._writer.write(_LENGTH.pack(len(frame)) + frame)

    def send(self, commands: list[Command]) -> None:
        """Queues one frame of commands; never waits."""
        self.send_bytes(self._encoder.encode(commands))

    async def receive(self) -> Reply:
        """The next reply. May be cancelled only where no further reply is wanted.

        Raises:
            PeerGone: the engine process has ended and all that it sent was received.
        """
        try:
            head = await self._reader.readexactly(_LENGTH.size)
            body = await self._reader.readexactly(_LENGTH.unpack(head)[0])
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise PeerGone from error
        return self._decoder.decode(body)

    def close(self) -> None:
        """Closes this end: the engine process sees it and ends."""
        self._writer.close()
