"""A tuning record: which of an engine's kernels were fastest on one kind of GPU, as measured there.

It is JSON, kept beside the engine as an OCI artifact that refers to it, one for each name of a GPU. It holds no code: a
row names one of the candidates that the engine has for a site (`kernels/tuning.py`), so the worst that a wrong record
can do is to choose a slower one. What a site is, this file does not know.
"""

from typing import Literal

import msgspec

from shared.errors import TuningRefused

MAX_TUNING_BYTES = 1 << 20
MAX_GPU_NAME_CHARACTERS = 128
# Kinds of GPU that an engine has records of.
MAX_TUNINGS = 64


class TunedSite(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What was measured at one site.

    Args:
        op, tokens, sequences, n, k, dtype, layout, rides: the site; see `kernels.tuning.Site`.
        built_in, choice: names of candidates: what runs without the record, and with it.
        built_in_us, choice_us: medians of what the site launches in one step, in microseconds.
    """

    op: str
    tokens: int
    sequences: int
    n: int
    k: int
    dtype: str
    layout: str
    rides: str
    built_in: str
    built_in_us: float
    choice: str
    choice_us: float


class TuningRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What was measured of one engine on one GPU.

    Args:
        format: of this record.
        gpu: the device's name, as its driver gives it.
        arch: of the engine.
        engine: `sha256:` and the digest of the engine's manifest.
        builder: the engine's, which holds the fingerprint of its kernels' code.
        measured_at: RFC 3339, UTC.
        measured_by: versions of what measured.
        sites: every site that was measured, also those that keep the built-in choice.
    """

    format: Literal[1] = 1
    gpu: str
    arch: str
    engine: str
    builder: str
    measured_at: str
    measured_by: str
    sites: tuple[TunedSite, ...]


def record_to_json(record: TuningRecord) -> bytes:
    """The record as it is kept."""
    return msgspec.json.encode(record)


def record_from_json(text: bytes, *, gpu: str, engine: str) -> TuningRecord:
    """The record that `record_to_json` wrote, of this GPU and of the engine with this manifest.

    Raises:
        TuningRefused: it is none, or another GPU's or engine's.
    """

    def refused(problem: str) -> TuningRefused:
        return TuningRefused(gpu=gpu, problem=problem)

    if len(text) > MAX_TUNING_BYTES:
        raise refused(f"it has {len(text):,} bytes, at most {MAX_TUNING_BYTES:,} are read")
    try:
        record = msgspec.json.decode(text, type=TuningRecord)
    except msgspec.MsgspecError as error:
        raise refused(f"it is malformed: {error}") from None
    if record.gpu != gpu:
        raise refused(f"it was measured on {record.gpu!r}")
    if record.engine != engine:
        raise refused(f"it was measured with the engine of manifest {record.engine[:19]}")
    return record


def is_gpu_name(text: str) -> bool:
    """Claims that a GPU may be called so: a line of text that can be a blob's title."""
    is_path = text.startswith("/") or ".." in text.split("/")
    return 0 < len(text) <= MAX_GPU_NAME_CHARACTERS and text.isprintable() and not is_path
