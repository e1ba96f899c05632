"""Pins: what a build or a pull in progress needs, although no engine names it yet.

A pin is a file of digests, locked by the process that holds it. A sweep keeps what locked pins
list; a pin that nobody locks belonged to a process that died, and goes.
"""

import errno
import os
import uuid
from pathlib import Path

from shared.store.locks import try_lock


class Pin:
    """Keeps blobs from being swept until it is released or its process ends."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / uuid.uuid4().hex
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        self._fd = os.open(self._path, flags, 0o644)
        assert try_lock(self._fd), "a new pin is locked by somebody else"

    def add(self, digest: str) -> None:
        """Keeps this blob too."""
        line = f"{digest}\n".encode()
        if os.write(self._fd, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))

    def release(self) -> None:
        """Lets go of all of them."""
        os.unlink(self._path)
        os.close(self._fd)


def pinned_digests(folder: Path) -> set[str]:
    """What living pins keep; removes dead ones. The caller keeps new pins from being made."""
    digests: set[str] = set()
    for path in folder.iterdir():
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # released since the folder was read
            continue
        try:
            if try_lock(fd):
                path.unlink(missing_ok=True)  # it may be released this moment, and so removed
            else:
                with open(fd, closefd=False) as file:
                    digests.update(file.read().split())
        finally:
            os.close(fd)
    return digests
