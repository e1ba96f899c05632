"""Connections to daemons: addresses, channel options, health."""

import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar, cast

import grpc

from millrace.errors import MillraceError, from_rpc_error
from millrace.tracing import current_traceparent

_Channel = TypeVar("_Channel")

DEFAULT_COMPILER = "127.0.0.1:7601"
DEFAULT_RUNTIME = "127.0.0.1:7602"
DEFAULT_GATEWAY = "127.0.0.1:7600"
_MAX_MESSAGE_BYTES = 64 << 20
# grpc.health.v1, spoken by hand so that the SDK needs no package for it: the request for the whole
# server is empty, and a response that says SERVING is field 1 = 1.
_HEALTH_CHECK = "/grpc.health.v1.Health/Check"
_SERVING = b"\x08\x01"


def channel_options(address: str) -> list[tuple[str, int | str]]:
    """How channels to `address` behave: big messages, dead peers found, no proxy to loopback."""
    return [
        ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.enable_http_proxy", int(not is_local(address))),
        # A daemon that restarts is found again quickly.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
    ]


@dataclass(frozen=True, slots=True)
class Security:
    """How a client proves itself to the daemons, and they prove themselves to it.

    Args:
        api_key: `mr_...`, as `millrace keys create` showed it.
        tls_ca: path of the CA that signed the daemons' certificates (PEM); "" speaks plaintext.
        tls_cert: path of the client's own certificate, where daemons ask for one.
        tls_key: path of its private key.
    Raises:
        ValueError: a file is missing, no PEM, or of another certificate.
    """

    api_key: str = field(default="", repr=False)
    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""

    def __post_init__(self) -> None:
        if bool(self.tls_cert) != bool(self.tls_key) or (self.tls_cert and not self.tls_ca):
            raise ValueError(
                "a client's certificate and its key go together, and with the daemons' CA"
            )
        # gRPC itself would tell about a broken file in its log alone, at every call.
        try:
            self.context()
        except OSError as error:  # ssl.SSLError is one
            files = " or ".join(filter(None, (self.tls_ca, self.tls_cert, self.tls_key)))
            raise ValueError(f"TLS cannot use {files}: {error}") from None

    def check(self, address: str) -> None:
        """Raises ValueError where the key would cross a network in plaintext."""
        if self.api_key and not self.tls_ca and not is_local(address):
            raise ValueError(f"an API key is sent to {address} over TLS alone: give tls_ca")

    def context(self) -> ssl.SSLContext | None:
        """The TLS part as HTTP's libraries take it; None where the system's CAs are to do."""
        if not self.tls_ca:
            return None
        context = ssl.create_default_context(cafile=self.tls_ca)
        if self.tls_cert:
            context.load_cert_chain(self.tls_cert, self.tls_key)
        return context

    def credentials(self) -> grpc.ChannelCredentials | None:
        """gRPC's form of the TLS part."""
        if not self.tls_ca:
            return None
        files = (self.tls_ca, self.tls_key, self.tls_cert)
        return grpc.ssl_channel_credentials(*(Path(f).read_bytes() if f else None for f in files))


OPEN = Security()


def is_local(address: str) -> bool:
    """Claims that `address` is on this machine."""
    return address.startswith(("127.", "localhost:", "[::1]", "unix:"))


def open_channel(address: str, security: Security = OPEN) -> grpc.Channel:
    """A blocking channel; it connects when it is used.

    Raises:
        ValueError: the API key would cross a network in plaintext.
    """
    security.check(address)
    credentials, options = security.credentials(), channel_options(address)
    if credentials is None:
        return _keyed(grpc.insecure_channel(address, options), security)
    return _keyed(grpc.secure_channel(address, credentials, options), security)


def open_async_channel(address: str, security: Security = OPEN) -> grpc.aio.Channel:
    """An asyncio channel; it connects when it is used. As `open_channel`."""
    security.check(address)
    credentials, options = security.credentials(), channel_options(address)
    if credentials is None:
        return _keyed(grpc.aio.insecure_channel(address, options), security)
    return _keyed(grpc.aio.secure_channel(address, credentials, options), security)


def _keyed(channel: _Channel, security: Security) -> _Channel:
    return cast(_Channel, _KeyedChannel(channel, security.api_key))


class _KeyedChannel:
    """A channel, blocking or asyncio, whose calls carry an API key and the program's trace context.

    gRPC's own call credentials want TLS, which loopback does without, and interceptors of
    asyncio's streams cost every message.
    """

    def __init__(self, channel: Any, api_key: str) -> None:
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        self.close = channel.close
        for kind in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
            setattr(self, kind, self._with_key(getattr(channel, kind)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _with_key(self, make_method: Callable[..., Any]) -> Callable[..., Any]:
        def make(*arguments: Any, **named: Any) -> Any:
            method = make_method(*arguments, **named)

            def call(*requests: Any, **options: Any) -> Any:
                metadata = self._metadata
                if traceparent := current_traceparent():
                    metadata = (*metadata, ("traceparent", traceparent))
                return method(*requests, metadata=metadata or None, **options)

            return call

        return make


def is_serving(address: str, timeout_s: float = 1.0, security: Security = OPEN) -> bool:
    """Whether the daemon at `address` answers and says that it serves.

    Raises:
        MillraceError: it does not answer.
    """
    with open_channel(address, security) as channel:
        check: grpc.UnaryUnaryMultiCallable[bytes, bytes]
        check = channel.unary_unary(_HEALTH_CHECK, lambda message: message, lambda message: message)
        try:
            return check(b"", timeout=timeout_s) == _SERVING
        except grpc.RpcError as raised:
            raise from_rpc_error(raised, address) from None


def wait_until_answering(
    address: str, timeout_s: float, check: Callable[[], None], must_serve: bool
) -> bool:
    """Whether the daemon at `address` came to answer (and serve) within `timeout_s`.

    Args:
        check: called between tries; raises to give up.
        must_serve: also waits until its health says SERVING.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        check()
        try:
            if is_serving(address) or not must_serve:
                return True
        except MillraceError:  # expected until it has started
            pass
        time.sleep(0.05)
    return False
