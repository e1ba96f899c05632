"""Small files that are there whole or not at all, also after a loss of power."""

import os
import uuid
from pathlib import Path


def written_file(folder: Path, content: bytes) -> Path:
    """A new file on the disk, under a name of its own: to be moved to its place at once."""
    path = folder / f"{os.getpid()}-{uuid.uuid4().hex}"
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return path


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` survive a loss of power."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
