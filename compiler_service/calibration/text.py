"""Which text a build looks at: the user's file, or the small one beside this module; and its digest.

Plain text is UTF-8. A file that ends in `.jsonl` has a JSON value a line: a string, or an object
with a string under `text`. Of a large file the first megabytes are used; its digest covers all.
"""

import codecs
import functools
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from compiler_service.checkpoints.digest import FileHashes
from shared.errors import InvalidField, ModelChanged

DEFAULT_TEXT = Path(__file__).parent / "public_domain.txt"
_MAX_CHARACTERS = 4 << 20
_FIELD = "calibration_uri"


def calibration_path(uri: str) -> Path:
    """The file that `uri` means; empty means the shipped text.

    Raises:
        InvalidField: there is no such file.
    """
    if not uri:
        return DEFAULT_TEXT
    path = Path(unquote(urlsplit(uri).path) if uri.startswith("file:") else uri)
    try:
        path = path.expanduser()
    except RuntimeError as error:  # of a user that there is not
        raise InvalidField(field=_FIELD, problem=f"no file {path}: {error}") from error
    if not path.is_file():
        raise InvalidField(field=_FIELD, problem=f"no file {path} on the compile daemon")
    return path


def calibration_digest(uri: str, hashes: FileHashes) -> str:
    """SHA-256 of the calibration text's file, bare hexadecimal.

    Raises:
        InvalidField: there is no such file, or it cannot be read.
    """
    path = calibration_path(uri)
    if path == DEFAULT_TEXT:
        return _default_digest()
    with _reading(path):
        return hashes.sha256(path)


def read_calibration_text(uri: str, digest: str) -> list[str]:
    """The documents in the file; one where it is plain text.

    Raises:
        ModelChanged: the file is no longer the one of `digest`.
        InvalidField: it cannot be read, or is not of a form that is read here; names the line.
    """
    path = calibration_path(uri)
    with _reading(path), path.open("rb") as file:
        content = file.read(4 * _MAX_CHARACTERS)
        hashed = hashlib.sha256(content)
        is_whole = True
        while rest := file.read(1 << 20):
            hashed.update(rest)
            is_whole = False
    if hashed.hexdigest() != digest:
        raise ModelChanged(file=path.name)
    # The last character of what was read may continue in what was not.
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    try:
        text = decoder.decode(content, final=is_whole)[:_MAX_CHARACTERS]
    except UnicodeDecodeError as error:
        problem = f"{path.name} is not UTF-8 text (byte {error.start})"
        raise InvalidField(field=_FIELD, problem=problem) from error
    if path.suffix.lower() != ".jsonl":
        if "\0" in text:
            problem = f"{path.name} is no text: character {text.index(chr(0))} is NUL"
            raise InvalidField(field=_FIELD, problem=problem)
        return [text]
    # Strings in JSON may hold the other characters that `splitlines` takes for ends of lines.
    lines = text.split("\n")
    if len(text) == _MAX_CHARACTERS:  # the last line may go on
        lines.pop()
        if not lines:
            problem = f"line 1 of {path.name} is longer than {_MAX_CHARACTERS} characters"
            raise InvalidField(field=_FIELD, problem=problem)
    return [
        _document(path.name, number, line) for number, line in enumerate(lines, 1) if line.strip()
    ]


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Tells what the disk, or another user's file, refuses as the user's field."""
    try:
        yield
    except OSError as error:
        problem = f"{path} cannot be read on the compile daemon ({error.strerror})"
        raise InvalidField(field=_FIELD, problem=problem) from error


def _document(name: str, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:  # the latter for brackets without end
        problem = f"line {number} of {name} is not JSON"
        raise InvalidField(field=_FIELD, problem=problem) from error
    text = value.get("text") if isinstance(value, dict) else value
    if not isinstance(text, str):
        problem = f"line {number} of {name} has no string under `text`"
        raise InvalidField(field=_FIELD, problem=problem)
    if any("\ud800" <= character <= "\udfff" for character in text):
        problem = f"line {number} of {name} holds half of a surrogate pair, which is no character"
        raise InvalidField(field=_FIELD, problem=problem)
    return text


@functools.cache
def _default_digest() -> str:
    return hashlib.sha256(DEFAULT_TEXT.read_bytes()).hexdigest()
