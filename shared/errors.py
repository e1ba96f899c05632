"""Every way Millrace can fail a user, a row each, and its form on the wire.

`raise PromptTooLong(prompt_tokens=9000, max_sequence_tokens=8192)` carries a gRPC status code, a
reason for programs (`ErrorInfo`, domain `millrace`), metadata, and one sentence for people: what is
wrong, what was found, what to do. Our own mistakes are `assert`s, not rows.
Source: google.rpc error model, AIP-193.
"""

import math
from typing import ClassVar

import grpc
from google.protobuf.any_pb2 import Any
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

DOMAIN = "millrace"


class MillraceError(Exception):
    """A user's mistake or the world's failure.

    Args:
        fields: fill the row's sentence and become `ErrorInfo.metadata`, as text.
        retry_after_s: set where trying again can help; becomes `RetryInfo`, and `{retry_s}` of the sentence.
    """

    reason: ClassVar[str] = "INTERNAL"
    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    template: ClassVar[str] = "Something unforeseen failed; the daemon's log says what."
    default_retry_after_s: ClassVar[float | None] = None

    def __init__(self, *, retry_after_s: float | None = None, **fields: object) -> None:
        self.fields = {name: str(value) for name, value in fields.items()}
        self.retry_after_s = self.default_retry_after_s if retry_after_s is None else retry_after_s
        retry_s = "" if self.retry_after_s is None else _seconds_text(self.retry_after_s)
        super().__init__(self.template.format(**{"retry_s": retry_s, **self.fields}))
        self._status: status_pb2.Status | None = None

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process borders (build child, engine process) by pickle.
        return _restore, (type(self), self.fields, self.retry_after_s)


def _seconds_text(seconds: float) -> str:
    """At least as long, for people: `0.3`, `12`."""
    return f"{math.ceil(seconds * 10) / 10:g}" if seconds < 10 else str(math.ceil(seconds))


def _restore(
    row: type[MillraceError], fields: dict[str, str], retry_after_s: float | None
) -> MillraceError:
    return row(retry_after_s=retry_after_s, **fields)


_S = grpc.StatusCode


class UnsupportedModel(MillraceError):
    """The checkpoint's architecture has no family."""

    reason, code = "UNSUPPORTED_MODEL", _S.INVALID_ARGUMENT
    template = "Model architecture {architecture!r} is not supported; supported: {known}."


class InvalidModel(MillraceError):
    """The checkpoint is broken or contradicts itself."""

    reason, code = "INVALID_MODEL", _S.INVALID_ARGUMENT
    template = "The checkpoint cannot be used: {problem}."


class UnsupportedArch(MillraceError):
    """No such target."""

    reason, code = "UNSUPPORTED_ARCH", _S.INVALID_ARGUMENT
    template = "Arch {arch!r} is not supported; supported: {known}."


class UnsupportedQuant(MillraceError):
    """No such scheme, or not on this arch, or not with these sizes."""

    reason, code = "UNSUPPORTED_QUANT", _S.INVALID_ARGUMENT
    template = "Quantization {quant!r} cannot be used: {problem}."


class UnsupportedTp(MillraceError):
    """The model does not divide by this degree."""

    reason, code = "UNSUPPORTED_TP", _S.INVALID_ARGUMENT
    template = "Tensor parallel degree {degree} cuts {what}; degrees that work: {known}."


class InvalidField(MillraceError):
    """A request's field is out of range, missing or contradictory."""

    reason, code = "INVALID_FIELD", _S.INVALID_ARGUMENT
    template = "{field}: {problem}."


class PromptTooLong(MillraceError):
    """Prompt and requested tokens do not fit the engine's sequence limit."""

    reason, code = "PROMPT_TOO_LONG", _S.INVALID_ARGUMENT
    template = (
        "The prompt has {prompt_tokens} tokens and the engine takes sequences of at most "
        "{max_sequence_tokens}, prompt and at least one new token together; shorten the prompt."
    )


class ModelNotFound(MillraceError):
    """Nothing at the model URI."""

    reason, code = "MODEL_NOT_FOUND", _S.NOT_FOUND
    template = "No model at {model_uri!r}: {problem}."


class EngineNotFound(MillraceError):
    """No engine of that name or selector."""

    reason, code = "ENGINE_NOT_FOUND", _S.NOT_FOUND
    template = "No engine {engine!r} in the store; `millrace engines` lists what there is."


class BuildNotFound(MillraceError):
    """No build or operation of that name."""

    reason, code = "BUILD_NOT_FOUND", _S.NOT_FOUND
    template = (
        "No build {build!r}: records expire {kept} after they end, and go where Redis loses its "
        "data; ask for it again."
    )


class BlobNotFound(MillraceError):
    """No blob of that digest."""

    reason, code = "BLOB_NOT_FOUND", _S.NOT_FOUND
    template = "No blob {digest} in the store."


class ArchMismatch(MillraceError):
    """The engine's machine code is for another device."""

    reason, code = "ARCH_MISMATCH", _S.FAILED_PRECONDITION
    template = "The engine is built for {built_for} and this device is {found}; run: {command}"


class FormatMismatch(MillraceError):
    """The engine's format version is unknown to this runtime."""

    reason, code = "FORMAT_MISMATCH", _S.FAILED_PRECONDITION
    template = (
        "The engine has format {found} and this runtime reads {readable}; rebuild the engine or "
        "update the runtime."
    )


class DriverTooOld(MillraceError):
    """The device's driver cannot load the engine."""

    reason, code = "DRIVER_TOO_OLD", _S.FAILED_PRECONDITION
    template = "The engine needs a driver for CUDA {needed} and this one is for {found}; update it."


class KernelMissing(MillraceError):
    """The engine's machine code is not what this version of the runtime launches."""

    reason, code = "KERNEL_MISSING", _S.FAILED_PRECONDITION
    template = (
        "The engine has no kernel {kernel} as this runtime launches it: another version of Millrace "
        "built it; rebuild the engine, or serve it with that version."
    )


class QualityGate(MillraceError):
    """The quantized engine is worse than allowed."""

    reason, code = "QUALITY_GATE", _S.FAILED_PRECONDITION
    template = "The quantized model fails its quality gate: {problem}."


class GenerationNotFound(MillraceError):
    """No such generation to go on with."""

    reason, code = "GENERATION_NOT_FOUND", _S.NOT_FOUND
    template = "No generation {generation!r} to go on with; a gateway keeps them for a while."


class DeploymentNotFound(MillraceError):
    """No deployment of that name."""

    reason, code = "DEPLOYMENT_NOT_FOUND", _S.NOT_FOUND
    template = "No deployment {deployment!r}; `millrace status` lists what there is."


class NoDeployments(MillraceError):
    """A gateway that has no Redis was asked to write a deployment down."""

    reason, code = "NO_DEPLOYMENTS", _S.FAILED_PRECONDITION
    template = "This gateway keeps no deployments, as it has no Redis; start it with --redis-url."


class ModelNotServed(MillraceError):
    """No runtime serves a model or deployment of that name."""

    reason, code = "MODEL_NOT_SERVED", _S.NOT_FOUND
    template = "No model {model!r} is served here; there are: {known}."


class NotARuntime(MillraceError):
    """A gateway was asked to load an engine."""

    reason, code = "NOT_A_RUNTIME", _S.UNIMPLEMENTED
    template = "A gateway runs no engine; ask a runtime, or use `millrace deploy`."


class FollowsDeployment(MillraceError):
    """A member of a deployment was asked to load an engine of somebody's choice."""

    reason, code = "FOLLOWS_DEPLOYMENT", _S.FAILED_PRECONDITION
    template = (
        "This runtime serves what the deployment {deployment} says; change that with "
        "`millrace deploy {deployment} ...`, or end it with `millrace undeploy {deployment}`."
    )


class NoEngine(MillraceError):
    """Nothing that was asked for is served."""

    reason, code = "NO_ENGINE", _S.UNAVAILABLE
    template = "No engine is served here now for {wanted}."
    default_retry_after_s = 1.0


class BuildQueueFull(MillraceError):
    """Too many builds wait."""

    reason, code = "BUILD_QUEUE_FULL", _S.RESOURCE_EXHAUSTED
    template = "{queued} builds are waiting and at most {max_queued} may; try again in {retry_s} s."
    default_retry_after_s = 30.0


class QueueFull(MillraceError):
    """Too many tokens wait for admission."""

    reason, code = "QUEUE_FULL", _S.RESOURCE_EXHAUSTED
    template = "{waiting_tokens} tokens are waiting and at most {max_waiting_tokens} may; try again in {retry_s} s."
    default_retry_after_s = 1.0


class DiskFull(MillraceError):
    """The store's disk has no room."""

    reason, code = "DISK_FULL", _S.RESOURCE_EXHAUSTED
    template = "No room left on the disk of {path}; free some and try again."


class Draining(MillraceError):
    """The daemon is stopping."""

    reason, code = "DRAINING", _S.UNAVAILABLE
    template = "The daemon is stopping and takes nothing new."
    default_retry_after_s = 1.0


class EngineLost(MillraceError):
    """The engine process died or hung; it is being restarted."""

    reason, code = "ENGINE_LOST", _S.UNAVAILABLE
    template = "The engine process was lost ({problem}) and is being restarted; start again."
    default_retry_after_s = 2.0


class RedisUnreachable(MillraceError):
    """Redis does not answer, or takes no writes."""

    reason, code = "REDIS_UNREACHABLE", _S.UNAVAILABLE
    template = "Redis at {url} {problem}."
    default_retry_after_s = 2.0


class CompilerUnreachable(MillraceError):
    """The compile daemon does not answer."""

    reason, code = "COMPILER_UNREACHABLE", _S.UNAVAILABLE
    template = "The compile daemon at {address} does not answer: {problem}."
    default_retry_after_s = 2.0


class StoreUnreachable(MillraceError):
    """A remote store does not answer, or not as one."""

    reason, code = "STORE_UNREACHABLE", _S.UNAVAILABLE
    template = "The store {store} does not answer: {problem}."
    default_retry_after_s = 2.0


class StoreRefused(MillraceError):
    """A remote store does not let this daemon do what it has to."""

    reason, code = "STORE_REFUSED", _S.FAILED_PRECONDITION
    template = "The store {store} refuses this: {problem}; check the daemon's credentials for it."


class StoreNotFound(MillraceError):
    """There is no such bucket or repository."""

    reason, code = "STORE_NOT_FOUND", _S.FAILED_PRECONDITION
    template = "The store {store} does not exist: {problem}; make it, or check its name."


class CacheTooSmall(MillraceError):
    """The engine does not fit into the cache beside what is in use."""

    reason, code = "CACHE_TOO_SMALL", _S.FAILED_PRECONDITION
    template = (
        "{engine} needs {needed_bytes} bytes and the cache may hold {cache_bytes}, of which "
        "{used_bytes} are in use; raise --cache-bytes."
    )


class DeviceFull(MillraceError):
    """The GPU's memory does not hold the engine."""

    reason, code = "DEVICE_FULL", _S.RESOURCE_EXHAUSTED
    template = (
        "The GPU has no room for {engine} ({problem}); free some of its memory, serve a smaller "
        "quantization, or lower --max-sequences or --max-step-tokens."
    )


class DeadlineExceeded(MillraceError):
    """The generation took longer than its client allowed."""

    reason, code = "DEADLINE_EXCEEDED", _S.DEADLINE_EXCEEDED
    template = "The generation did not end within {timeout_s} s."


class Unauthenticated(MillraceError):
    """The caller showed no API key, or none that is valid."""

    reason, code = "UNAUTHENTICATED", _S.UNAUTHENTICATED
    template = "{problem}; send a valid one as the metadata `authorization: Bearer mr_...`."


class PermissionDenied(MillraceError):
    """The caller's API key does not allow this."""

    reason, code = "PERMISSION_DENIED", _S.PERMISSION_DENIED
    template = "{rpc} needs the scope {scope!r} and this API key has: {scopes}."


class GatewayRefused(MillraceError):
    """The runtimes do not take the gateway's own API key."""

    reason, code = "GATEWAY_REFUSED", _S.FAILED_PRECONDITION
    template = "Runtimes refuse this gateway's API key; it needs the scopes generate and delegate."


class QuotaExceeded(MillraceError):
    """The tenant used up one of its limits."""

    reason, code = "QUOTA_EXCEEDED", _S.RESOURCE_EXHAUSTED
    template = "The tenant's limit of {allowed} {limit} is used up; try again in {retry_s} s."
    default_retry_after_s = 1.0


class EngineNotTrusted(MillraceError):
    """No trusted key signed the engine."""

    reason, code = "ENGINE_NOT_TRUSTED", _S.FAILED_PRECONDITION
    template = "{engine} was not loaded: {problem}; sign it with `millrace sign`, or trust its signer's key."


class TuningRefused(MillraceError):
    """A tuning record is not one of this GPU and engine."""

    reason, code = "TUNING_REFUSED", _S.INVALID_ARGUMENT
    template = (
        "The tuning record for {gpu} was refused: {problem}; measure again with `millrace tune`."
    )


class WorkerLost(MillraceError):
    """A build lost its worker too often."""

    reason, code = "WORKER_LOST", _S.ABORTED
    template = "The build lost its worker {attempts} times; the last sign was in stage {stage}."


class ModelChanged(MillraceError):
    """The checkpoint changed while it was being built."""

    reason, code = "MODEL_CHANGED", _S.ABORTED
    template = "{file} changed while it was being read; build again."


class DigestMismatch(MillraceError):
    """A blob's bytes are not those of its name."""

    reason, code = "DIGEST_MISMATCH", _S.DATA_LOSS
    template = "Blob {digest} holds other bytes ({found}); it was not used."


class Internal(MillraceError):
    """Anything unforeseen; its traceback is in the log only."""


ERRORS: dict[str, type[MillraceError]] = {
    row.reason: row
    for row in (
        GenerationNotFound, DeploymentNotFound, NoDeployments, ModelNotServed, NotARuntime,
        FollowsDeployment,
        UnsupportedModel, InvalidModel, UnsupportedArch, UnsupportedQuant, UnsupportedTp,
        InvalidField, PromptTooLong, ModelNotFound, EngineNotFound, BuildNotFound, BlobNotFound,
        ArchMismatch, FormatMismatch, DriverTooOld, KernelMissing, QualityGate, NoEngine,
        BuildQueueFull,
        QueueFull, DiskFull, Draining, EngineLost, RedisUnreachable, CompilerUnreachable,
        StoreUnreachable, StoreRefused, StoreNotFound, CacheTooSmall, DeviceFull,
        DeadlineExceeded, Unauthenticated, PermissionDenied, GatewayRefused, QuotaExceeded,
        EngineNotTrusted, TuningRefused, WorkerLost, ModelChanged, DigestMismatch, Internal,
    )
}  # fmt: skip


def to_status(error: MillraceError) -> status_pb2.Status:
    """`error` as it crosses the wire: code, sentence, ErrorInfo, and RetryInfo or BadRequest.

    It is made once, for one error may be told to many; not to be changed.
    """
    if error._status is None:
        error._status = _new_status(error)
    return error._status


def _new_status(error: MillraceError) -> status_pb2.Status:
    status = status_pb2.Status(code=error.code.value[0], message=str(error))
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.fields)
    details: list[
        error_details_pb2.ErrorInfo | error_details_pb2.RetryInfo | error_details_pb2.BadRequest
    ]
    details = [info]
    if error.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(round(error.retry_after_s * 1000))
        details.append(retry)
    if isinstance(error, InvalidField):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.fields["field"], description=error.fields["problem"]
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    for detail in details:
        packed = Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def reason_of(status: status_pb2.Status) -> str:
    """The reason in `status`, or "" where it carries none."""
    info = error_details_pb2.ErrorInfo()
    for detail in status.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            detail.Unpack(info)
            return str(info.reason)
    return ""


def from_status(status: status_pb2.Status) -> MillraceError:
    """The error that `to_status` made `status` from; `Internal` where it is not one of ours."""
    info = error_details_pb2.ErrorInfo()
    retry = error_details_pb2.RetryInfo()
    retry_after_s = None
    for detail in status.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            detail.Unpack(info)
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            detail.Unpack(retry)
            retry_after_s = retry.retry_delay.ToMilliseconds() / 1000
    row = ERRORS.get(info.reason) if info.domain == DOMAIN else None
    if row is None:
        return Internal()
    return row(retry_after_s=retry_after_s, **dict(info.metadata))


def of_compiler(error: grpc.RpcError, address: str) -> MillraceError:
    """What a failed call of the compile daemon at `address` means to whoever asked this daemon.

    What that daemon says of a model, an engine or a build is passed on. That it does not answer,
    or does not know this daemon, is no fault of the one who asked.
    """
    status = rpc_status.from_call(error)
    reason = "" if status is None else reason_of(status)
    ours = (Unauthenticated.reason, PermissionDenied.reason, QuotaExceeded.reason)
    if status is not None and reason in ERRORS and reason not in ours:
        return from_status(status)
    problem = f"{error.code().name}: {error.details()}"
    return CompilerUnreachable(address=address, problem=problem)
