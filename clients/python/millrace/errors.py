"""What a call can raise: one exception, with everything that the daemon said.

Decodes google.rpc.Status as the daemons send it: an ErrorInfo of the domain `millrace`, RetryInfo
where trying again can help, BadRequest for fields.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from reprlib import repr as _shortened
from typing import TypeVar

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

AnyMessage = TypeVar("AnyMessage", bound=Message)

UNREACHABLE = "UNREACHABLE"
MAY_ASK_FOR_TLS = "it may ask for TLS, or a client certificate of its CA"
_CALL_ENDED = "CALL_ENDED"
_DETAILS_KEY = "grpc-status-details-bin"
_CODES = {code.value[0]: code for code in grpc.StatusCode}

# Marks in what gRPC and BoringSSL say of a connection that did not come about, first match first.
_TLS_PROBLEMS = (
    ("certificate has expired", "its certificate has expired"),
    ("CERTIFICATE_VERIFY_FAILED", "its certificate is not signed by the given CA"),
    ("Hostname Verification", "its certificate is for another host"),
    ("WRONG_VERSION_NUMBER", "it does not speak TLS; leave the CA out"),
    ("Socket closed", f"it ends connections; {MAY_ASK_FOR_TLS}"),
    ("handshake failed", "the TLS handshake failed"),
)


@dataclass(eq=False)
class MillraceError(Exception):
    """A call, a build or a generation failed.

    Args:
        message: one sentence for people: what is wrong, what was found, what to do.
        reason: for programs, such as `ENGINE_NOT_FOUND`; docs/API.md lists them. `UNREACHABLE`
            where no daemon answered, and the name of the code where a status carried no reason.
        code: gRPC status code.
        metadata: the values that the message speaks of.
        retry_after_s: set where trying again can help: wait this long first.
    """

    message: str
    reason: str
    code: grpc.StatusCode
    metadata: Mapping[str, str] = field(default_factory=dict)
    retry_after_s: float | None = None

    def __str__(self) -> str:
        return self.message


def from_status(status: status_pb2.Status) -> MillraceError:
    """The error that `status` says."""
    code = _CODES.get(status.code, grpc.StatusCode.UNKNOWN)
    error = MillraceError(status.message, code.name, code)
    for packed in status.details:
        info = error_details_pb2.ErrorInfo()
        retry = error_details_pb2.RetryInfo()
        if packed.Unpack(info):
            error.reason, error.metadata = info.reason, dict(info.metadata)
        elif packed.Unpack(retry):
            error.retry_after_s = retry.retry_delay.ToMilliseconds() / 1000
    return error


def from_rpc_error(
    raised: grpc.RpcError, address: str, start: str = "millrace up"
) -> MillraceError:
    """The error that a call of the daemon at `address` ended with.

    Args:
        start: the command that starts such a daemon on this machine, at `{address}`.
    """
    assert isinstance(raised, grpc.Call | grpc.aio.AioRpcError), "every ended call has a status"
    for key, value in raised.trailing_metadata() or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            return from_status(status_pb2.Status.FromString(value))
    code, details = raised.code(), raised.details() or ""
    if code is grpc.StatusCode.UNAVAILABLE:
        message = f"No daemon answers at {address}{_what_to_do(address, details, start)}"
        if problem := _tls_problem(details):
            message = f"{address} cannot be spoken to: {problem}"
        return MillraceError(message, UNREACHABLE, code, {"address": address, "details": details})
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        details = f"The daemon at {address} did not answer in time."
    if code is grpc.StatusCode.UNIMPLEMENTED:
        details = f"The daemon at {address} does not offer this: it is of another kind, or older."
    return MillraceError(details or code.name, code.name, code, {"address": address})


def filled(
    message: type[AnyMessage], options: Mapping[str, str] | None = None, /, **fields: object
) -> AnyMessage:
    """A message of those fields.

    Args:
        options: what callers call fields that have another name on the wire.
    Raises:
        MillraceError: INVALID_FIELD, a number is beyond what the field holds, or text is no Unicode.
        TypeError: a field does not exist, or its value is of another type.
    """
    try:
        return message(**fields)
    except ValueError:
        for name, value in fields.items():
            option = (options or {}).get(name, name)
            try:
                message(**{name: value})
            except UnicodeEncodeError:
                raise not_utf8(option, value) from None
            except ValueError:
                raise invalid_field(option, f"out of range, found {_shortened(value)}") from None
        raise


def invalid_field(name: str, problem: str) -> MillraceError:
    """The error of an argument that cannot be sent, in the daemons' own form."""
    code = grpc.StatusCode.INVALID_ARGUMENT
    return MillraceError(f"{name}: {problem}.", "INVALID_FIELD", code, {"field": name})


def not_utf8(name: str, value: object) -> MillraceError:
    """The error of text with half of a surrogate pair, which the wire cannot carry.

    Python reads bytes that are none of UTF-8, of a command line or a file's name, as such halves.
    """
    return invalid_field(name, f"is not UTF-8, found {_shortened(value)}")


def is_lost_call(error: MillraceError) -> bool:
    """Claims that a call broke, and that its generations may go on elsewhere."""
    return error.reason in (UNREACHABLE, _CALL_ENDED)


def _what_to_do(address: str, details: str, start: str) -> str:
    """How a sentence about a daemon that does not answer ends."""
    if address.startswith(("127.", "localhost:", "[::1]")):
        return f"; start one with: {start.format(address=address)}"
    # gRPC's last words say why: connection refused, no such name, no route.
    why = details.rpartition(": ")[2].strip(" .]")
    return f" ({why}); is it running, and is that its address?"


def _tls_problem(details: str) -> str:
    """What gRPC's words about a connection say of TLS; "" where they say nothing."""
    if "failed to connect" not in details:
        return ""
    return next((problem for mark, problem in _TLS_PROBLEMS if mark in details), "")


def build_cancelled(name: str) -> MillraceError:
    """The error of waiting for a build that somebody cancelled."""
    return MillraceError(
        f"The build {name} was cancelled.", "CANCELLED", grpc.StatusCode.CANCELLED, {"build": name}
    )


def corrupt_blob(digest: str, found: str) -> MillraceError:
    """The error of bytes that are not those of their name."""
    return MillraceError(
        f"Blob {digest} arrived with other bytes ({found}); it was not used.",
        "DIGEST_MISMATCH",
        grpc.StatusCode.DATA_LOSS,
        {"digest": digest, "found": found},
    )


def session_left(address: str) -> MillraceError:
    """The error of a stream whose session, or client, was closed while it ran."""
    return MillraceError(
        f"The session with {address} was closed.", "CANCELLED", grpc.StatusCode.CANCELLED
    )


def call_ended(address: str) -> MillraceError:
    """The error of a daemon that ended a call before its generations had ended."""
    return MillraceError(
        f"The daemon at {address} ended the call.", _CALL_ENDED, grpc.StatusCode.UNAVAILABLE
    )
