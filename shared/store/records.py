"""What a name in a store leads to, and what to do with a record that makes no sense.

Records are written whole. One that is damaged all the same, or that another tool wrote, is as good as absent: it
hides no other, and whoever publishes, pulls or pushes what it was of makes it anew.
"""

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import structlog

from shared.engine import Blob, canonical_json
from shared.errors import EngineNotFound, InvalidField
from shared.store import oci

_MIN_PREFIX_CHARACTERS = 6

# What a parser raises that meets what it does not know.
_SENSELESS = (
    LookupError, TypeError, ValueError, AttributeError, InvalidField, ArithmeticError, RecursionError
)  # fmt: skip

Said = TypeVar("Said")

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """What an engine's name leads to: its manifest, and the Unix time of its publication."""

    manifest: Blob
    created_s: float

    def to_json(self) -> bytes:
        """Canonical JSON."""
        manifest = oci.descriptor(self.manifest)
        return canonical_json({"manifest": manifest, "created_s": self.created_s})

    @staticmethod
    def from_json(text: bytes) -> "EngineRecord":
        """The record that `to_json` wrote; raises one of `_SENSELESS` where it is none."""
        raw = json.loads(text)
        created_s = float(raw["created_s"])
        if not math.isfinite(created_s):
            raise ValueError(f"{created_s} is no time")
        return EngineRecord(oci.blob_of(raw["manifest"]), created_s)


def full_digest(name: str, key_digests: Callable[[], Iterable[str]]) -> str:
    """The digest of the key of the engine that `name` means: `engines/<digest>`, or its first digits.

    Args:
        key_digests: gives those that there are; asked only where the name is not whole.
    Raises:
        EngineNotFound: it is no such name, or fits none, or several.
    """
    prefix = name.removeprefix("engines/")
    if not re.fullmatch(rf"[0-9a-f]{{{_MIN_PREFIX_CHARACTERS},64}}", prefix):
        raise EngineNotFound(engine=name)
    if len(prefix) == 64:
        return prefix
    fits = [digest for digest in key_digests() if digest.startswith(prefix)]
    if len(fits) != 1:
        raise EngineNotFound(engine=name)
    return fits[0]


class Records:
    """Reads what others may have written; remembers what it has told of."""

    def __init__(self) -> None:
        self._passed_over: set[str] = set()

    def read(self, path: Path, parse: Callable[[bytes], Said]) -> Said | None:
        """What a file says, as `parse`.

        Raises:
            FileNotFoundError: there is no such file.
        """
        return self.parse(str(path), path.read_bytes(), parse)

    def parse(self, name: str, text: bytes, parse: Callable[[bytes], Said]) -> Said | None:
        """What `text` says; None where there is no sense in it, which the log says once.

        Args:
            parse: raises one of `_SENSELESS` where it finds none.
        """
        try:
            return parse(text)
        except _SENSELESS as error:
            self.pass_over(name, error)
            return None

    def pass_over(self, name: str, error: Exception) -> None:
        """Tells, once, that the record of that name is of no use."""
        if name not in self._passed_over:
            problem = f"{type(error).__name__}: {error}"
            _log.warning("store_record_passed_over", record=name, problem=problem)
        self._passed_over.add(name)
