"""A relay: `python -m runtime_service.relay`, started by `Relays`, which writes it a line of options."""

import asyncio
import signal
import sys

import grpc
import uvloop

from runtime_service.relay.options import ENVELOPE_BYTES, RelayOptions
from runtime_service.relay.proxy import Proxy
from shared.log import configure_logging
from shared.server import message_options, server_options
from shared.settings import SettingsError
from shared.tls import server_credentials

# For what the daemon has said to reach its readers.
_LAST_EVENTS_S = 2.0


async def serve(options: RelayOptions) -> None:
    """Takes calls until SIGTERM."""
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    upstream = grpc.aio.insecure_channel(
        options.upstream, options=message_options(options.max_message_bytes + ENVELOPE_BYTES)
    )
    server = grpc.aio.server(options=server_options(options.max_message_bytes, shares_port=True))
    server.add_generic_rpc_handlers((Proxy(upstream, options.names_callers),))
    try:
        if options.tls.cert is None:
            server.add_insecure_port(options.listen)
        else:
            server.add_secure_port(options.listen, server_credentials(options.tls))
    except (RuntimeError, SettingsError) as error:
        _say(str(error))
        return
    await server.start()
    _say("listening")
    await ended.wait()
    await server.stop(_LAST_EVENTS_S)
    await upstream.close()


def _say(line: str) -> None:
    sys.stdout.write(line.replace("\n", " ") + "\n")
    sys.stdout.flush()


def main() -> None:
    """Runs the relay."""
    options = RelayOptions.of_line(sys.stdin.buffer.readline())
    configure_logging(options.log_level, options.log_format, "relay")
    uvloop.run(serve(options))


if __name__ == "__main__":
    main()
