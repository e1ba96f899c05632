"""A model's digest: a Merkle digest over the SHA-256 of everything that it is made of.

Never a path: a moved folder keeps its digest, one changed byte does not. File hashes are cached by
(inode, size, mtime_ns), so an unchanged model of any size is named in milliseconds.
"""

import fcntl
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from shared.engine import canonical_json
from shared.errors import InvalidModel, ModelChanged

_CHUNK_BYTES = 4 << 20


class FileHashes:
    """A cache of file hashes in one JSON file; losing it costs time, never truth."""

    def __init__(self, cache_dir: Path) -> None:
        self._path = cache_dir / "file_hashes.json"

    def known(self, path: Path) -> str | None:
        """The hash of the file as it is now, if it was hashed in this state before."""
        return self._load().get(str(path.resolve()), {}).get(_state_of(path))

    def sha256(self, path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
        """The file's SHA-256, bare hexadecimal; read only when the cache does not know it.

        Raises:
            ModelChanged: the file changed while it was read.
        """
        known = self.known(path)
        if known is not None:
            return known
        before = _state_of(path)
        digest = sha256_of_file(path, on_bytes)
        if _state_of(path) != before:
            raise ModelChanged(file=path.name)
        self._remember(path, before, digest)
        return digest

    def _load(self) -> dict[str, dict[str, str]]:
        try:
            table = json.loads(self._path.read_bytes())
        except (FileNotFoundError, ValueError, RecursionError):
            # None yet, or spoiled by a crash: either way everything is simply hashed again.
            return {}
        if not isinstance(table, dict):
            return {}
        return {path: known for path, known in table.items() if isinstance(known, dict)}

    def _remember(self, path: Path, state: str, digest: str) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Requests are resolved side by side: none may lose what another has just added.
        with self._path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            table = self._load()
            table[str(path.resolve())] = {state: digest}
            scratch = self._path.with_suffix(".tmp")
            scratch.write_text(json.dumps(table))
            scratch.replace(self._path)


def sha256_of_file(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """SHA-256 of the file's bytes, bare hexadecimal."""
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            hasher.update(chunk)
            if on_bytes is not None:
                on_bytes(len(chunk))
    return hasher.hexdigest()


def model_digest(
    inputs: Mapping[str, Path | bytes],
    hashes: FileHashes,
    on_bytes: Callable[[int], None] | None = None,
) -> str:
    """The digest of a checkpoint's `digest_inputs`, bare hexadecimal."""
    leaves = {
        title: hashlib.sha256(content).hexdigest()
        if isinstance(content, bytes)
        else hashes.sha256(content, on_bytes)
        for title, content in inputs.items()
    }
    return _merkle_root(leaves)


def known_model_digest(inputs: Mapping[str, Path | bytes], hashes: FileHashes) -> str | None:
    """The digest where no file need be read for it, else None."""
    leaves = {}
    for title, content in inputs.items():
        known = (
            hashlib.sha256(content).hexdigest()
            if isinstance(content, bytes)
            else hashes.known(content)
        )
        if known is None:
            return None
        leaves[title] = known
    return _merkle_root(leaves)


def verify_unchanged(
    inputs: Mapping[str, Path | bytes],
    hashes: FileHashes,
    expected: str,
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """Reads every file again and checks that they still are the model called `expected`.

    Raises:
        ModelChanged: they are not; names the file where it can be told.
    """
    leaves = {}
    for title, content in inputs.items():
        if isinstance(content, bytes):
            leaves[title] = hashlib.sha256(content).hexdigest()
            continue
        known = hashes.known(content)
        leaves[title] = sha256_of_file(content, on_bytes)
        if known != leaves[title]:
            raise ModelChanged(file=title)
    if _merkle_root(leaves) != expected:
        raise ModelChanged(file=", ".join(sorted(leaves)))


def _merkle_root(leaves: Mapping[str, str]) -> str:
    return hashlib.sha256(canonical_json(dict(leaves))).hexdigest()


def _state_of(path: Path) -> str:
    try:
        stat = path.stat()
    except FileNotFoundError as error:
        raise InvalidModel(problem=f"{path.name} vanished while it was being read") from error
    return f"{stat.st_ino} {stat.st_size} {stat.st_mtime_ns}"
