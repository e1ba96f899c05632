"""Locks on files, between the processes of one machine.

`flock` belongs to the open file: a lock dies with its process, and is shared with children forked
while it is held.
"""

import fcntl
import os
from pathlib import Path
from types import TracebackType


class FileLock:
    """A lock on the file at `path`, which is made for it; a context manager, used once.

    Args:
        shared: many may hold it so at once, beside no exclusive holder.
        removes: the file goes with the lock; only for exclusive ones.
    """

    def __init__(self, path: Path, *, shared: bool = False, removes: bool = False) -> None:
        assert not (shared and removes), "a shared lock's file may be in use by another holder"
        self.path = path
        self._how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        self._removes = removes
        self._fd = -1

    def __enter__(self) -> "FileLock":
        while True:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fcntl.flock(fd, self._how)
            if _is_at(fd, self.path):
                self._fd = fd
                return self
            # The holder before us removed the file: our lock is on a file nobody else can find.
            os.close(fd)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._removes:
            os.unlink(self.path)
        os.close(self._fd)


def try_lock(fd: int) -> bool:
    """Takes the lock on an open file if nobody holds it; false where somebody does."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:  # flock's way of saying that it is held
        return False
    return True


def _is_at(fd: int, path: Path) -> bool:
    ours = os.fstat(fd)
    try:
        theirs = os.stat(path)
    except FileNotFoundError:
        return False
    return (ours.st_dev, ours.st_ino) == (theirs.st_dev, theirs.st_ino)
