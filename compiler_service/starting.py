"""How the compile daemon starts: it reads the settings, and finds or brings a Redis."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from compiler_service.settings import CompilerSettings
from shared.errors import MillraceError
from shared.log import configure_logging
from shared.settings import SettingsError, exit_with
from shared.tracing import configure_tracing

if TYPE_CHECKING:
    from shared.redis import EmbeddedRedis


def run() -> None:
    """Runs the daemon until a signal."""
    settings = CompilerSettings.load()
    configure_logging(settings.log_level, settings.log_format, "compiler")
    # Imported once the settings are good: --help and a wrong flag answer at once.
    from compiler_service.daemon import serve

    try:
        configure_tracing("compiler")
        with _redis(settings) as (url, embedded):
            asyncio.run(serve(settings, url, embedded))
    except (MillraceError, SettingsError, OSError) as error:
        exit_with(f"millrace-compiler: {error}")


@contextmanager
def _redis(settings: CompilerSettings) -> Iterator[tuple[str, "EmbeddedRedis | None"]]:
    """Where Redis is: as the settings say, else a server of our own, which is the second."""
    if settings.redis_url:
        yield settings.redis_url, None
        return
    from shared.redis import EmbeddedRedis

    with EmbeddedRedis(settings.state_dir) as server:
        yield server.url, server
