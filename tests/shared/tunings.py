"""Tuning records for tests: whole ones, of engines that nobody measured."""

import msgspec

from shared.engine import EngineManifest
from shared.tuning import TunedSite, TuningRecord, record_to_json

GPU = "NVIDIA Test GPU 80GB"
SITE = TunedSite(
    op="linear", tokens=1, sequences=0, n=64, k=32, dtype="bf16", layout="plain", rides="add",
    built_in="a", built_in_us=10.0, choice="b", choice_us=9.0,
)  # fmt: skip


def record_of(
    engine: EngineManifest, gpu: str = GPU, sites: tuple[TunedSite, ...] = (SITE,)
) -> TuningRecord:
    """A record of `engine`."""
    return TuningRecord(
        gpu=gpu,
        arch=engine.key.arch,
        engine=engine.manifest.digest,
        builder=engine.key.builder,
        measured_at="2026-11-27T20:00:00Z",
        measured_by="millrace test",
        sites=sites,
    )


def record_bytes(engine: EngineManifest, gpu: str = GPU, choice: str = "b") -> bytes:
    """The same as it is kept."""
    site = msgspec.structs.replace(SITE, choice=choice)
    return record_to_json(record_of(engine, gpu, (site,)))
