"""A daemon's relays: processes that listen on its address, while it listens on a socket that only they reach."""

import asyncio
import contextlib
import socket
import subprocess
import sys
import tempfile
import time
from functools import partial

import msgspec
import structlog

from runtime_service.relay.options import ENVELOPE_BYTES, RelayOptions
from shared.background import Background
from shared.log import LogFormat
from shared.process import ending_with_parent
from shared.security import ServerSecurity
from shared.settings import Settings, SettingsError, split_address

_START_S, _STOP_S = 60.0, 5.0
_LEAST_RETRY_S, _MOST_RETRY_S = 0.2, 30.0

_log = structlog.get_logger()


def relays_of(count: int, settings: Settings, security: ServerSecurity) -> "Relays | None":
    """The relays of a daemon of these settings; None where it wants none."""
    if not count:
        return None
    return Relays(
        count, settings.max_message_bytes, security, settings.log_level, settings.log_format
    )


class Relays:
    """`count` relays of one daemon; see `shared.server.Entrance`.

    Args:
        max_message_bytes: that clients may send and receive.
        security: what is asked of clients. Relays speak TLS with them; keys are the daemon's to check.
    """

    def __init__(
        self,
        count: int,
        max_message_bytes: int,
        security: ServerSecurity,
        log_level: str = "info",
        log_format: LogFormat = "auto",
    ) -> None:
        # For this user alone: who reaches the socket is trusted as a relay is.
        self._folder = tempfile.TemporaryDirectory(prefix="millrace-relay-")
        self.inner_listen = f"unix:{self._folder.name}/daemon.sock"
        self.envelope_bytes = ENVELOPE_BYTES
        self._count = count
        self._options = RelayOptions(
            upstream=self.inner_listen,
            listen="",
            max_message_bytes=max_message_bytes,
            tls=security.tls,
            names_callers=security.api_keys is None,
            log_level=log_level,
            log_format=log_format,
        )
        self._held: socket.socket | None = None
        self._background = Background()
        self.pids: set[int] = set()

    async def open(self, listen: str) -> str:
        """Starts them; returns the address once all of them listen there.

        Args:
            listen: `host:port`; port 0 takes a free one.
        Raises:
            SettingsError: they cannot listen there.
        """
        host, port = split_address(listen)
        self._held = _held(host, port)
        address = f"{host}:{self._held.getsockname()[1]}"
        self._options = msgspec.structs.replace(self._options, listen=address)
        started = [asyncio.get_running_loop().create_future() for _ in range(self._count)]
        for first in started:
            self._background.keep("keep_relay", partial(self._keep, first))
        try:
            await asyncio.gather(*started)
        except BaseException:
            await self.close()
            raise
        return address

    async def close(self) -> None:
        """Ends them when they have passed on what they had, and frees the address."""
        await self._background.close()
        if self._held is not None:
            self._held.close()
        self._folder.cleanup()

    async def _keep(self, first: "asyncio.Future[None]") -> None:
        """Has one relay run, again and again, until it is cancelled; the first start may fail for good."""
        delay_s = _LEAST_RETRY_S
        while True:
            began_s = time.monotonic()
            try:
                status = await self._run(first)
            except SettingsError as error:
                if not first.done():
                    first.set_exception(error)
                    return
                problem = str(error)
            else:
                problem = f"it ended with status {status}"
            _log.error("relay_lost", problem=problem)
            if time.monotonic() - began_s > _MOST_RETRY_S:
                delay_s = _LEAST_RETRY_S
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, _MOST_RETRY_S)

    async def _run(self, listening: "asyncio.Future[None]") -> int:
        try:
            process = _started()
        except OSError as error:  # no more processes, or no memory for one
            raise SettingsError(f"a relay cannot be started: {error}") from None
        self.pids.add(process.pid)
        try:
            said = await _reader(process)
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
                stdin.write(self._options.to_line())
            try:
                async with asyncio.timeout(_START_S):
                    problem = (await said.readline()).decode().rstrip("\n")
            except TimeoutError:
                problem = f"it did not begin within {_START_S:.0f} s"
            if problem != "listening":
                raise SettingsError(f"a relay cannot listen: {problem or 'it ended'}")
            if not listening.done():
                listening.set_result(None)
            await said.read()
            return process.wait()
        finally:
            await _end(process)
            self.pids.discard(process.pid)


def _started() -> "subprocess.Popen[bytes]":
    # Not by asyncio: uvloop forks, which gRPC's threads in this process have it complain about.
    return subprocess.Popen(
        ending_with_parent([sys.executable, "-m", "runtime_service.relay"]),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # A Ctrl-C in the terminal is for the daemon, which ends its relays last.
        start_new_session=True,
    )


async def _reader(process: "subprocess.Popen[bytes]") -> asyncio.StreamReader:
    """What the process says; at its end the process has ended, or is about to."""
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, process.stdout)
    return reader


async def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STOP_S):
                await asyncio.to_thread(process.wait)
        process.kill()
        process.wait()


def _held(host: str, port: int) -> socket.socket:
    """A socket that keeps the address for the relays, and takes nothing itself: it does not listen.

    Raises:
        SettingsError: the address is somebody else's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        held = socket.socket(family, kind, protocol)
    except OSError as error:
        raise SettingsError(f"cannot listen on {host}:{port}: {error}") from None
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(address)
    except OSError as error:
        held.close()
        raise SettingsError(f"cannot listen on {host}:{port}: {error}") from None
    return held
