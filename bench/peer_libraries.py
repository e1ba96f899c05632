"""Libraries that benchmarks compare with: the project does not install them."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def peer_libraries(*packages: str) -> Iterator[None]:
    """A block that imports them.

    Args:
        packages: what pip installs them by.
    Raises:
        SystemExit: one is missing, in a line that says what to install.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        missing = error.name or str(error)
        raise SystemExit(f"{missing} is missing: pip install {' '.join(packages)}") from None
