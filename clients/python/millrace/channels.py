"""Connections to daemons: addresses, channel options, health."""

import time
from collections.abc import Callable

import grpc

from millrace.errors import MillraceError, from_rpc_error

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
    is_local = address.startswith(("127.", "localhost:", "[::1]", "unix:"))
    return [
        ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.enable_http_proxy", int(not is_local)),
        # A daemon that restarts is found again quickly.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
    ]


def open_channel(address: str) -> grpc.Channel:
    """A blocking channel; it connects when it is used."""
    return grpc.insecure_channel(address, options=channel_options(address))


def open_async_channel(address: str) -> grpc.aio.Channel:
    """An asyncio channel; it connects when it is used."""
    return grpc.aio.insecure_channel(address, options=channel_options(address))


def is_serving(address: str, timeout_s: float = 1.0) -> bool:
    """Whether the daemon at `address` answers and says that it serves.

    Raises:
        MillraceError: it does not answer.
    """
    with open_channel(address) as channel:
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
