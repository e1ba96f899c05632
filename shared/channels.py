"""Channels from a daemon to others: in plaintext or TLS, with an API key or without."""

import ipaddress
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar, cast

import grpc
from grpc_status import rpc_status

from shared.errors import EngineLost, MillraceError, from_status, reason_of
from shared.settings import SettingsError
from shared.tls import TlsFiles

Channel = TypeVar("Channel")
Options = Sequence[tuple[str, int]]
Metadata = Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class PeerSecurity:
    """How this daemon proves itself to those that it calls, and how they prove themselves to it.

    Args:
        tls: `ca` turns TLS on and says whose servers are trusted.
        is_insecure: lets the key cross a network in plaintext.
    """

    tls: TlsFiles = field(default_factory=TlsFiles)
    api_key: str = field(default="", repr=False)
    is_insecure: bool = False

    @staticmethod
    def load(tls: TlsFiles, api_key_file: Path | None, is_insecure: bool = False) -> "PeerSecurity":
        """What the settings name.

        Raises:
            SettingsError: a file is missing, or no certificate, CA or key.
        """
        tls.check()
        if tls.cert is not None and tls.ca is None:
            raise SettingsError("a client certificate needs --peer-tls-ca, the servers' CA")
        if api_key_file is None:
            return PeerSecurity(tls, is_insecure=is_insecure)
        return PeerSecurity(tls, _key_in(api_key_file), is_insecure)

    def check(self, address: str) -> None:
        """Raises SettingsError where calling the daemon at `address` would give the key away."""
        is_private = self.tls.ca is not None or is_loopback(address.rpartition(":")[0])
        if self.api_key and not is_private and not self.is_insecure:
            raise SettingsError(
                f"the API key is sent to {address} over TLS alone: give --peer-tls-ca, or say "
                "--insecure"
            )

    def channel(self, address: str, options: Options = ()) -> grpc.Channel:
        """A blocking channel to the daemon at `address`; raises as `check`."""
        self.check(address)
        credentials = self._credentials()
        if credentials is None:
            channel = grpc.insecure_channel(address, options=options)
        else:
            channel = grpc.secure_channel(address, credentials, options=options)
        return self._keyed(channel)

    def aio_channel(self, address: str, options: Options = ()) -> grpc.aio.Channel:
        """An asyncio channel to the daemon at `address`; raises as `check`."""
        self.check(address)
        credentials = self._credentials()
        if credentials is None:
            channel = grpc.aio.insecure_channel(address, options=options)
        else:
            channel = grpc.aio.secure_channel(address, credentials, options=options)
        return self._keyed(channel)

    def _credentials(self) -> grpc.ChannelCredentials | None:
        return None if self.tls.ca is None else grpc.ssl_channel_credentials(*self.tls.read())

    def _keyed(self, channel: Channel) -> Channel:
        keyed = _KeyedChannel(channel, self.api_key) if self.api_key else channel
        return cast(Channel, keyed)


def _key_in(path: Path) -> str:
    try:
        key = path.read_bytes().strip()
    except OSError as error:
        raise SettingsError(f"cannot read the API key: {error}") from None
    # Without one calls would go unkeyed, and gRPC carries nothing but printable ASCII.
    if re.fullmatch(rb"[!-~]+", key) is None:
        raise SettingsError(
            f"{path} holds no API key: one line as `millrace keys create` prints it"
        )
    return key.decode()


class _KeyedChannel:
    """A channel, blocking or asyncio, whose calls carry an API key.

    gRPC's own call credentials want TLS, which loopback does without, and interceptors of
    asyncio's streams cost every message.
    """

    def __init__(self, channel: Any, api_key: str) -> None:
        self._metadata = (("authorization", f"Bearer {api_key}"),)
        self.close = channel.close
        for kind in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
            setattr(self, kind, self._with_key(getattr(channel, kind)))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _with_key(self, make_method: Callable[..., Any]) -> Callable[..., Any]:
        def make(*arguments: Any, **named: Any) -> Any:
            method = make_method(*arguments, **named)

            def call(*requests: Any, metadata: Metadata = (), **options: Any) -> Any:
                return method(*requests, metadata=(*self._metadata, *metadata), **options)

            return call

        return make


def error_of(raised: grpc.aio.AioRpcError) -> MillraceError:
    """Why a runtime's call ended, in our terms: `EngineLost` where the runtime itself did not say."""
    status = rpc_status.from_call(raised)
    if status is not None and reason_of(status):
        return from_status(status)
    problem = f"{raised.code().name}: {raised.details()}".rstrip(".")
    return EngineLost(problem=problem)


def is_loopback(host: str) -> bool:
    """Claims that only this machine reaches `host`."""
    if host == "localhost" or host.startswith("unix:"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:  # a name, which may mean any address
        return False
