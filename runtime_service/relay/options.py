"""What a daemon tells its relays."""

import msgspec

from shared.log import LogFormat
from shared.tls import TlsFiles

# What a start may have more on its way to the daemon: its name there, and its trace.
ENVELOPE_BYTES = 1024


class RelayOptions(msgspec.Struct, frozen=True):
    """One line of JSON on a relay's standard input.

    Args:
        upstream: the daemon's own socket, `unix:PATH`.
        listen: `host:port`, which other relays listen on too.
        max_message_bytes: that clients may send and receive.
        tls: the server's certificate and key, and the clients' CA, where there are any.
        names_callers: the daemon asks for no keys: a client's certificate says whose it is.
    """

    upstream: str
    listen: str
    max_message_bytes: int
    tls: TlsFiles
    names_callers: bool
    log_level: str
    log_format: LogFormat

    def to_line(self) -> bytes:
        """As a line of JSON."""
        return msgspec.json.encode(self, enc_hook=str) + b"\n"

    @staticmethod
    def of_line(line: bytes) -> "RelayOptions":
        """Of what `to_line` gave."""
        return msgspec.json.decode(
            line, type=RelayOptions, dec_hook=lambda kind, value: kind(value)
        )
