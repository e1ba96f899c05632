"""Domain values as protocol messages, and back: key, quant, selector, blob, engine.

Both daemons and the store speak through these. A message from outside is checked here, so that
what leaves this file is well-formed; whether an arch or a scheme exists is not known here.
"""

import math

from millrace.engine.v1 import engine_pb2

from shared.engine import (
    Blob,
    EngineKey,
    EngineManifest,
    EngineSelector,
    QuantConfig,
    Signature,
    is_digest,
)
from shared.errors import InvalidField


def quant_to_proto(quant: QuantConfig) -> engine_pb2.QuantConfig:
    """`quant` as it crosses the wire."""
    return engine_pb2.QuantConfig(
        scheme=quant.scheme,
        group_size=quant.group_size,
        keep=quant.keep,
        calibration_digest=quant.calibration_digest,
        calibration_tokens=quant.calibration_tokens,
        max_kl=quant.max_kl,
        max_perplexity_increase=quant.max_perplexity_increase,
        auto_keep=quant.auto_keep,
        skip_quality=quant.skip_quality,
        kv_cache=quant.kv_cache,
        probe_tokens=quant.probe_tokens,
        no_act_order=quant.no_act_order,
    )


def quant_from_proto(message: engine_pb2.QuantConfig) -> QuantConfig:
    """The quantization in `message`; the unset message gives an empty scheme.

    Raises:
        InvalidField: a size or a limit is negative, or no finite number.
    """
    sizes = ("group_size", "calibration_tokens", "probe_tokens")
    for name in (*sizes, "max_kl", "max_perplexity_increase"):
        value = getattr(message, name)
        if not 0 <= value < math.inf:
            problem = "must not be negative" if value < 0 else "must be a finite number"
            raise InvalidField(field=f"quant.{name}", problem=problem)
    return QuantConfig(
        message.scheme,
        message.group_size,
        tuple(message.keep),
        message.calibration_digest,
        message.calibration_tokens,
        message.max_kl,
        message.max_perplexity_increase,
        message.auto_keep,
        message.skip_quality,
        message.kv_cache,
        message.probe_tokens,
        message.no_act_order,
    )


def key_to_proto(key: EngineKey) -> engine_pb2.EngineKey:
    """`key` as it crosses the wire."""
    return engine_pb2.EngineKey(
        model_digest=key.model_digest,
        arch=key.arch,
        quant=quant_to_proto(key.quant),
        builder=key.builder,
    )


def key_from_proto(message: engine_pb2.EngineKey) -> EngineKey:
    """The key in `message`."""
    return EngineKey(
        message.model_digest, message.arch, quant_from_proto(message.quant), message.builder
    )


def selector_to_proto(selector: EngineSelector) -> engine_pb2.EngineSelector:
    """`selector` as it crosses the wire."""
    return engine_pb2.EngineSelector(
        model=selector.model, arch=selector.arch, quant=quant_to_proto(selector.quant)
    )


def selector_from_proto(message: engine_pb2.EngineSelector) -> EngineSelector:
    """The selector in `message`.

    Raises:
        InvalidField: no model.
    """
    if not message.model:
        raise InvalidField(field="selector.model", problem="must be a model's name or digest")
    return EngineSelector(message.model, message.arch, quant_from_proto(message.quant))


def blob_to_proto(blob: Blob) -> engine_pb2.Blob:
    """`blob` as it crosses the wire."""
    return engine_pb2.Blob(
        media_type=blob.media_type,
        digest=blob.digest,
        size_bytes=blob.size_bytes,
        title=blob.title,
    )


def blob_from_proto(message: engine_pb2.Blob) -> Blob:
    """The descriptor in `message`.

    Raises:
        InvalidField: a malformed digest, or a negative size.
    """
    if not is_digest(message.digest):
        raise InvalidField(
            field="digest", problem=f"{message.digest!r} is not sha256: and 64 hexadecimal digits"
        )
    if message.size_bytes < 0:
        raise InvalidField(field="size_bytes", problem="must not be negative")
    return Blob(message.media_type, message.digest, message.size_bytes, message.title)


def engine_to_proto(engine: EngineManifest) -> engine_pb2.Engine:
    """`engine` as it crosses the wire."""
    message = engine_pb2.Engine(
        name=engine.name,
        key=key_to_proto(engine.key),
        model=engine.model,
        format_version=engine.format_version,
        manifest=blob_to_proto(engine.manifest),
        layers=[blob_to_proto(blob) for blob in engine.layers],
    )
    message.create_time.FromMicroseconds(round(engine.created_s * 1_000_000))
    for signature in engine.signatures:
        message.signatures.add(public_key=signature.public_key, signature=signature.signature)
    message.tunings.extend(map(blob_to_proto, engine.tunings))
    return message


def engine_from_proto(message: engine_pb2.Engine) -> EngineManifest:
    """The engine in `message`; its name is the digest of its key, whatever `message.name` says."""
    return EngineManifest(
        key=key_from_proto(message.key),
        model=message.model,
        format_version=message.format_version,
        layers=tuple(blob_from_proto(blob) for blob in message.layers),
        manifest=blob_from_proto(message.manifest),
        created_s=message.create_time.ToMicroseconds() / 1_000_000,
        signatures=tuple(Signature(s.public_key, s.signature) for s in message.signatures),
        tunings=tuple(blob_from_proto(blob) for blob in message.tunings),
    )
