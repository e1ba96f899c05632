"""A model URI to its checkpoint: one row a scheme.

| URI | is |
|---|---|
| a path, `file:` | a Hugging Face folder, quantized or not, or a GGUF file |
| `hf:org/name@revision` | a repository on the Hugging Face hub |
| `sample:smollm2-135m` | a model out of an installed Python package |
| `random:<config.json>?seed=N` | random weights of that config |
"""

import errno
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from compiler_service.checkpoints.checkpoint import Checkpoint
from compiler_service.checkpoints.gguf_file import GgufFile
from compiler_service.checkpoints.hub import open_hub_repository
from compiler_service.checkpoints.quantized_folder import open_folder
from compiler_service.checkpoints.random_model import RandomModel
from compiler_service.checkpoints.sample import open_sample
from shared.errors import InvalidField, ModelNotFound

# What asking for a path that cannot be one gives.
_NO_PATH = {errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.ENOTDIR}


def open_checkpoint(model_uri: str) -> Checkpoint:
    """The checkpoint at `model_uri`, opened and its head read; no weights yet.

    Raises:
        ModelNotFound: nothing is there.
        InvalidModel, UnsupportedModel: what is there cannot be used.
        InvalidField: the URI is empty or of an unknown scheme.
    """
    if not model_uri.strip():
        raise InvalidField(field="model_uri", problem="it is empty; give a path or a URI")
    try:
        return _open(model_uri)
    except OSError as error:
        if error.errno not in _NO_PATH:
            raise
        problem = f"that is no path here ({error.strerror})"
        raise ModelNotFound(model_uri=model_uri, problem=problem) from error


def _open(model_uri: str) -> Checkpoint:
    scheme, colon, rest = model_uri.partition(":")
    if colon and scheme in SOURCES:
        return SOURCES[scheme](rest)
    if colon and re.fullmatch(r"[a-z][a-z0-9+.-]+", scheme) and not Path(model_uri).exists():
        problem = (
            f"{scheme}: is no known scheme; known: a path, {', '.join(f'{s}:' for s in SOURCES)}"
        )
        raise InvalidField(field="model_uri", problem=problem)
    return open_path(_expanded(model_uri))


def open_path(path: Path) -> Checkpoint:
    """The checkpoint in a folder or a GGUF file."""
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelNotFound(model_uri=path, problem="the folder holds no config.json")
        return open_folder(path)
    if path.is_file():
        return GgufFile(path)
    problem = "no such file or folder on the compile daemon's machine"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        problem += f"; a model of the Hugging Face hub is hf:{path}"
    raise ModelNotFound(model_uri=path, problem=problem)


def _expanded(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:  # no such user: a folder may still be called so
        return Path(text)


def _open_file_uri(rest: str) -> Checkpoint:
    try:
        path = unquote(urlsplit(f"file:{rest}").path)
    except ValueError as error:
        raise InvalidField(field="model_uri", problem=f"it is no URI: {error}") from None
    return open_path(Path(path))


def _open_random(rest: str) -> Checkpoint:
    path_text, _, query = rest.partition("?")
    seed = re.fullmatch(r"(?:seed=(\d{1,18}))?", query)
    if seed is None:
        raise InvalidField(field="model_uri", problem=f"{query!r} should be seed=<number>")
    path = _expanded(path_text)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ModelNotFound(model_uri=f"random:{rest}", problem=f"no file {path}")
    return RandomModel(path, int(seed[1] or 0))


SOURCES: dict[str, Callable[[str], Checkpoint]] = {
    "file": _open_file_uri,
    "hf": open_hub_repository,
    "sample": open_sample,
    "random": _open_random,
}
