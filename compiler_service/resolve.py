"""What is asked for, made exact: a model URI, arches and a scheme become engine keys."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from compiler_service.calibration.text import calibration_digest
from compiler_service.checkpoints.checkpoint import Checkpoint
from compiler_service.checkpoints.digest import FileHashes, known_model_digest, model_digest
from compiler_service.checkpoints.sources import open_checkpoint
from compiler_service.fingerprints import builder_for
from compiler_service.planning import plan
from compiler_service.quantization import scheme_named
from compiler_service.quantization.as_is import own_scheme
from shared.arch import arch_named
from shared.engine import EngineKey, QuantConfig
from shared.errors import InvalidField


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A request whose every key is known; keys by arch, in the order asked."""

    model: str
    model_digest: str
    quant: QuantConfig
    keys: Mapping[str, EngineKey]


def resolve(
    model_uri: str,
    archs: Sequence[str],
    quant: QuantConfig,
    model: str,
    cache_dir: Path,
    on_bytes: Callable[[int], None] | None = None,
    calibration_uri: str = "",
) -> ResolvedModel:
    """The keys of the engines that are asked for; reads the whole checkpoint if it is new.

    Args:
        quant: scheme "" means the checkpoint's own: its float format, or `as-is`.
        model: "" means a name derived from the checkpoint.
        cache_dir: where hashes of files are kept between calls.
        on_bytes: told how many bytes were just hashed.
        calibration_uri: the text to calibrate and measure with; empty for the shipped one.

    Raises:
        ModelNotFound, InvalidModel, UnsupportedModel: the checkpoint cannot be used.
        UnsupportedArch, UnsupportedQuant, InvalidField: the request cannot be met.
    """
    checkpoint = _open(model_uri, archs, quant)
    hashes = FileHashes(cache_dir)
    digest = model_digest(checkpoint.digest_inputs, hashes, on_bytes)
    quant = _with_text(checkpoint, quant, calibration_uri, hashes)
    return _resolved(checkpoint, archs, quant, model, digest)


def resolve_cached(
    model_uri: str,
    archs: Sequence[str],
    quant: QuantConfig,
    model: str,
    cache_dir: Path,
    calibration_uri: str = "",
) -> ResolvedModel | None:
    """As `resolve`, but None where files would have to be hashed first: never slow on a disk."""
    checkpoint = _open(model_uri, archs, quant)
    hashes = FileHashes(cache_dir)
    digest = known_model_digest(checkpoint.digest_inputs, hashes)
    if digest is None:
        return None
    quant = _with_text(checkpoint, quant, calibration_uri, hashes)
    return _resolved(checkpoint, archs, quant, model, digest)


def _open(model_uri: str, archs: Sequence[str], quant: QuantConfig) -> Checkpoint:
    """Opens the checkpoint, once everything was checked that needs no file."""
    if not archs:
        raise InvalidField(field="archs", problem="name at least one, such as cpu or sm_90")
    rows = [arch_named(name) for name in archs]
    if quant.scheme:
        scheme = scheme_named(quant)
        for row in rows:
            scheme.require_arch(quant, row)
        scheme.resolve(quant)
    return open_checkpoint(model_uri)


def _with_text(
    checkpoint: Checkpoint, quant: QuantConfig, calibration_uri: str, hashes: FileHashes
) -> QuantConfig:
    """The recipe of `quant`, its defaults filled in, with the digest of the text that it needs."""
    if quant.calibration_digest:
        problem = "is filled in by the compile daemon; say calibration_uri instead"
        raise InvalidField(field="quant.calibration_digest", problem=problem)
    quant = replace(quant, scheme=quant.scheme or own_scheme(checkpoint))
    scheme = scheme_named(quant)
    quant = scheme.resolve(quant)
    if scheme.needs_text(quant):
        return replace(quant, calibration_digest=calibration_digest(calibration_uri, hashes))
    if calibration_uri:
        problem = f"{quant.scheme} looks at no text here"
        raise InvalidField(field="calibration_uri", problem=problem)
    return quant


def _resolved(
    checkpoint: Checkpoint, archs: Sequence[str], quant: QuantConfig, model: str, digest: str
) -> ResolvedModel:
    keys = {
        arch: EngineKey(digest, arch, quant, builder_for(arch)) for arch in dict.fromkeys(archs)
    }
    name = model or checkpoint.name
    # The plan is what finds a checkpoint that contradicts itself, before anything is queued.
    for key in keys.values():
        plan(checkpoint, key, name)
    return ResolvedModel(name, digest, quant, keys)
