"""How the compile daemon starts: it reads the settings, and finds or brings a Redis."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from compiler_service.settings import CompilerSettings
from shared.errors import MillraceError
from shared.log import configure_logging
from shared.settings import SettingsError, exit_with
from shared.tracing import configure_tracing


def run() -> None:
    """Runs the daemon until a signal."""
    settings = CompilerSettings.load()
    configure_logging(settings.log_level, settings.log_format, "compiler")
    # Imported once the settings are good: --help and a wrong flag answer at once.
    from compiler_service.daemon import serve

    try:
        configure_tracing("compiler")
        with _redis_url(settings) as url:
            asyncio.run(serve(settings, url))
    except (MillraceError, SettingsError, OSError) as error:
        exit_with(f"millrace-compiler: {error}")


@contextmanager
def _redis_url(settings: CompilerSettings) -> Iterator[str]:
    """Where Redis is: as the settings say, else a server of our own."""
    if settings.redis_url:
        yield settings.redis_url
        return
    from shared.redis import EmbeddedRedis

    with EmbeddedRedis(settings.state_dir) as server:
        yield server.url
