"""How commands reach daemons: the connection's options and variables, read in one place."""

import os
import re
from typing import TypedDict

from millrace.aio import AsyncClient
from millrace.channels import DEFAULT_COMPILER, DEFAULT_RUNTIME, Security
from millrace.cli.failures import USAGE, CommandFailed
from millrace.client import Client
from millrace.fleet_client import FleetClient
from millrace.retries import Retries


class ConnectionOptions(TypedDict):
    """What clients take to prove themselves; see `Client`."""

    api_key: str
    tls_ca: str
    tls_cert: str
    tls_key: str


def connection() -> ConnectionOptions:
    """API key and TLS files of this invocation, as `Client` and `Security` take them.

    Raises:
        CommandFailed: a file cannot be used.
    """
    options = ConnectionOptions(
        api_key=os.environ.get("MILLRACE_CLI_API_KEY", ""),
        tls_ca=os.environ.get("MILLRACE_CLI_TLS_CA", ""),
        tls_cert=os.environ.get("MILLRACE_CLI_TLS_CERT", ""),
        tls_key=os.environ.get("MILLRACE_CLI_TLS_KEY", ""),
    )
    try:
        Security(**options)
    except ValueError as error:
        raise CommandFailed(str(error), USAGE) from None
    return options


def security() -> Security:
    """API key and TLS files of this invocation."""
    return Security(**connection())


def checked(address: str) -> str:
    """`address`, where gRPC would take it for one.

    Raises:
        CommandFailed: it is not of the form host:port.
    """
    if not re.fullmatch(r"unix:.+|(?:dns:///)?[^/]+:\d{1,5}", address):
        raise CommandFailed(f"{address!r} is not of the form host:port", USAGE)
    return address


def client(compiler: str = DEFAULT_COMPILER, runtime: str = DEFAULT_RUNTIME) -> Client:
    """A client of the daemons at these addresses, as this invocation's options say."""
    checked(compiler)
    checked(runtime)
    try:
        return Client(compiler, runtime, **connection())
    except ValueError as error:  # the key would cross a network in plaintext
        raise CommandFailed(str(error), USAGE) from None


def fleet_client(gateway: str) -> FleetClient:
    """A client of the fleet behind a gateway, as this invocation's options say."""
    checked(gateway)
    try:
        return FleetClient(gateway, **connection())
    except ValueError as error:
        raise CommandFailed(str(error), USAGE) from None


def async_client(runtime: str, retries: Retries) -> AsyncClient:
    """An asyncio client of a runtime, as this invocation's options say."""
    checked(runtime)
    try:
        return AsyncClient(runtime=runtime, retries=retries, **connection())
    except ValueError as error:
        raise CommandFailed(str(error), USAGE) from None
