"""The runtime daemon with another loader, as benchmarks start it.

    python -m bench.served_daemon LOADER PROFILE FLAGS...

PROFILE, where it is not empty, gets cProfile's statistics of the front process.
"""

import argparse
import cProfile
import os

import uvloop

from runtime_service.daemon import serve
from runtime_service.settings import RuntimeSettings
from shared.log import configure_logging


def main() -> None:
    """Serves until SIGTERM."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("loader", help="as the engine process imports it: module:function")
    parser.add_argument("profile", help="a file for cProfile's statistics; '' for none")
    parser.add_argument("flags", nargs="...", help="the daemon's own")
    options = parser.parse_args()
    loader, profile = options.loader, options.profile
    settings = RuntimeSettings.parse(options.flags, os.environ)
    configure_logging(settings.log_level, settings.log_format, "runtime")
    if not profile:
        uvloop.run(serve(settings, loader))
        return
    profiler = cProfile.Profile()
    profiler.runcall(uvloop.run, serve(settings, loader))
    profiler.dump_stats(profile)


if __name__ == "__main__":
    main()
