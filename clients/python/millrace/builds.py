"""What the SDK knows about builds; pure."""

from collections.abc import Iterable, Sequence
from typing import TypedDict, Unpack

from millrace.compiler.v1 import compiler_pb2 as pb
from millrace.engine.v1 import engine_pb2
from millrace.errors import build_cancelled, filled, from_status

TERMINAL_STATES = frozenset(
    {pb.BUILD_STATE_SUCCEEDED, pb.BUILD_STATE_FAILED, pb.BUILD_STATE_CANCELLED}
)


class RecipeOptions(TypedDict, total=False):
    """How a model is quantized beside scheme and group size, and what that may cost.

    keep: patterns of weights that stay in bf16, such as `lm_head` or `layers.0.*`.
    calibration: path, on the compile daemon, of the text to calibrate and measure with.
    calibration_tokens: how many of it a calibrating scheme looks at.
    max_kl: mean KL divergence, nats a token, beyond which the build fails.
    max_perplexity_increase: as a share (0.05 is 5 %), beyond which the build fails.
    auto_keep: keep more weights in bf16 instead of failing.
    skip_quality: measure nothing.
    kv_cache: how keys and values are kept: `fp8` or `int8`; empty: as activations are.
    probe_tokens: of the longest context that facts are hidden in and asked for; 0: 1,024.
    no_act_order: `int4-gptq` rounds columns as they are stored, not the most active first.
    """

    keep: Sequence[str]
    calibration: str
    calibration_tokens: int
    max_kl: float
    max_perplexity_increase: float
    auto_keep: bool
    skip_quality: bool
    kv_cache: str
    probe_tokens: int
    no_act_order: bool


def build_request(
    model_uri: str,
    archs: Sequence[str],
    quant: str,
    group_size: int,
    model: str,
    **recipe: Unpack[RecipeOptions],
) -> pb.BuildEngineRequest:
    """The wire form of what is asked; an empty `quant` leaves the checkpoint's own format."""
    request = pb.BuildEngineRequest(
        model_uri=model_uri,
        archs=archs,
        model=model,
        calibration_uri=recipe.get("calibration", ""),
    )
    config = filled(
        engine_pb2.QuantConfig,
        scheme=quant,
        group_size=group_size,
        keep=recipe.get("keep", ()),
        calibration_tokens=recipe.get("calibration_tokens", 0),
        max_kl=recipe.get("max_kl", 0.0),
        max_perplexity_increase=recipe.get("max_perplexity_increase", 0.0),
        auto_keep=recipe.get("auto_keep", False),
        skip_quality=recipe.get("skip_quality", False),
        kv_cache=recipe.get("kv_cache", ""),
        probe_tokens=recipe.get("probe_tokens", 0),
        no_act_order=recipe.get("no_act_order", False),
    )
    if config.ByteSize():
        request.quant.CopyFrom(config)
    return request


def has_ended(operation: pb.Operation) -> bool:
    """Claims that nothing of `operation` will change any more."""
    if operation.state == pb.OPERATION_STATE_RESOLVED:
        return all(build.state in TERMINAL_STATES for build in operation.builds)
    return operation.state == pb.OPERATION_STATE_FAILED


def raise_if_failed(operation: pb.Operation) -> None:
    """Raises MillraceError where the operation, or the first of its builds, failed."""
    if operation.state == pb.OPERATION_STATE_FAILED:
        raise from_status(operation.error)
    for build in operation.builds:
        raise_if_build_failed(build)


def raise_if_build_failed(build: pb.Build) -> None:
    """Raises MillraceError where `build` failed or was cancelled."""
    if build.state == pb.BUILD_STATE_FAILED:
        raise from_status(build.error)
    if build.state == pb.BUILD_STATE_CANCELLED:
        raise build_cancelled(build.name)


def engine_names(builds: Iterable[pb.Build]) -> list[str]:
    """Resource names of the engines that `builds` make."""
    return [build.name.replace("builds/", "engines/", 1) for build in builds]
