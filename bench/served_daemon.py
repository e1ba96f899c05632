"""The runtime daemon with another loader, as benchmarks start it.

    python -m bench.served_daemon LOADER PROFILE FLAGS...

PROFILE, where it is not empty, gets cProfile's statistics of the front process.
"""

import cProfile
import os
import sys

import uvloop

from runtime_service.daemon import serve
from runtime_service.settings import RuntimeSettings
from shared.log import configure_logging


def main() -> None:
    """Serves until SIGTERM."""
    loader, profile, *flags = sys.argv[1:]
    settings = RuntimeSettings.parse(flags, os.environ)
    configure_logging(settings.log_level, settings.log_format, "runtime")
    if not profile:
        uvloop.run(serve(settings, loader))
        return
    profiler = cProfile.Profile()
    profiler.runcall(uvloop.run, serve(settings, loader))
    profiler.dump_stats(profile)


if __name__ == "__main__":
    main()
