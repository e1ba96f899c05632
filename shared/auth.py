"""Who calls: API keys, the tenants behind them, and what each key may call.

A key is `mr_<id>_<secret>`. The secret is 256 random bits, so that what is stored is its plain
SHA-256: nobody guesses such a secret at any speed, and a slow password hash would only make every
call dear. The file that `millrace keys` writes is read again when it changes. Its form:

    {"keys": {"<id>": {"sha256": "<hex>", "tenant": "...", "scopes": ["generate"],
                       "created_s": 1.0, "is_revoked": false}},
     "tenants": {"...": {"requests_per_s": 5, "tokens_per_min": 60000, "concurrent": 8, "max_priority": 0}}}
"""

import hashlib
import hmac
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.errors import PermissionDenied, Unauthenticated
from shared.quotas import Limits, Quotas, TenantQuota
from shared.settings import SettingsError

Scope = Literal["generate", "build", "admin", "delegate"]

# What each rpc asks of a key. An rpc that has no row asks for `admin`; a test walks them all.
RPC_SCOPES: Mapping[str, Scope] = {
    "/millrace.runtime.v1.RuntimeService/Generate": "generate",
    "/millrace.runtime.v1.RuntimeService/GenerateStream": "generate",
    "/millrace.runtime.v1.RuntimeService/GetStatus": "generate",
    "/millrace.runtime.v1.RuntimeService/LoadEngine": "admin",
    "/millrace.runtime.v1.RuntimeService/UnloadEngine": "admin",
    "/millrace.compiler.v1.CompilerService/BuildEngine": "build",
    "/millrace.compiler.v1.CompilerService/WatchOperation": "build",
    "/millrace.compiler.v1.CompilerService/GetBuild": "build",
    "/millrace.compiler.v1.CompilerService/WatchBuild": "build",
    "/millrace.compiler.v1.CompilerService/CancelBuild": "build",
    "/millrace.compiler.v1.CompilerService/ListBuilds": "build",
    "/millrace.compiler.v1.CompilerService/ListEngines": "build",
    "/millrace.compiler.v1.CompilerService/GetEngine": "build",
    "/millrace.compiler.v1.CompilerService/DeleteEngine": "admin",
    "/millrace.compiler.v1.CompilerService/SignEngine": "build",
    "/millrace.compiler.v1.CompilerService/TuneEngine": "build",
    "/millrace.fleet.v1.FleetService/GetFleet": "generate",
    "/millrace.fleet.v1.FleetService/ApplyDeployment": "admin",
    "/millrace.fleet.v1.FleetService/DeleteDeployment": "admin",
    "/inference.GRPCInferenceService/ServerLive": "generate",
    "/inference.GRPCInferenceService/ServerReady": "generate",
    "/inference.GRPCInferenceService/ModelReady": "generate",
    "/inference.GRPCInferenceService/ServerMetadata": "generate",
    "/inference.GRPCInferenceService/ModelMetadata": "generate",
    "/inference.GRPCInferenceService/ModelConfig": "generate",
    "/inference.GRPCInferenceService/ModelInfer": "generate",
    "/inference.GRPCInferenceService/ModelStreamInfer": "generate",
    "/millrace.artifact.v1.ArtifactService/FindEngine": "build",
    "/millrace.artifact.v1.ArtifactService/ReadBlob": "build",
}
ALL_SCOPES: frozenset[Scope] = frozenset(("generate", "build", "admin"))

# For whom a gateway calls: UTF-8, which gRPC carries as bytes, for a name may be any text.
TENANT_METADATA = "millrace-tenant-bin"

_BEARER = "bearer "
_LOOK_AGAIN_S = 1.0
# Compared with where a key's id is unknown: an unknown id takes as long as a wrong secret.
_NOBODY = hashlib.sha256(b"").hexdigest()


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls, as the edge proved it.

    Args:
        tenant: separates prefix caches and quotas; "" where the daemon asks nobody.
        key_id: which of the tenant's keys; for logs.
    """

    tenant: str
    scopes: frozenset[Scope]
    quota: TenantQuota
    key_id: str = ""

    def require(self, rpc: str, scope: Scope) -> None:
        """Raises PermissionDenied where `scope` is not among the principal's."""
        if scope not in self.scopes:
            held = ", ".join(sorted(self.scopes)) or "none"
            raise PermissionDenied(rpc=rpc, scope=scope, scopes=held)


ANYBODY = Principal("", ALL_SCOPES, TenantQuota())
_caller: ContextVar[Principal] = ContextVar("caller", default=ANYBODY)


def caller() -> Principal:
    """Who makes the call that runs in this context; `ANYBODY` where the daemon does not ask."""
    return _caller.get()


def set_caller(principal: Principal) -> None:
    """Makes `principal` the caller of what runs in this context; for the edge alone."""
    _caller.set(principal)


class _StoredKey(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    tenant: str = Field(min_length=1)
    scopes: frozenset[Scope]
    created_s: float = 0.0
    is_revoked: bool = False


class _KeyFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: dict[str, _StoredKey]
    tenants: dict[str, Limits] = Field(default_factory=dict)


class ApiKeys:
    """The keys of a file, and the quotas of their tenants. May be used from several threads.

    A changed file counts within a second, a new key at once. One that cannot be read any more leaves the keys as they
    were, and an error in the log.

    Raises:
        SettingsError: there is no such file, or it is not a key file.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock = path, clock
        self._lock = threading.Lock()
        self._quotas = Quotas(clock)
        self._stamp = _stamp(path)
        self._file = _read(path)
        self._looked_s = clock()

    def authenticate(self, metadata: Iterable[tuple[str, str | bytes]]) -> Principal:
        """Who sent this metadata.

        Raises:
            Unauthenticated: no key, or none that is valid. Which part of it is wrong is not said.
        """
        presented = _header(metadata, "authorization")
        if not presented.lower().startswith(_BEARER):
            raise Unauthenticated(problem="This call carries no API key")
        key_id, _, secret = presented[len(_BEARER) :].strip().removeprefix("mr_").partition("_")
        with self._lock:
            self._look_again(_LOOK_AGAIN_S)
            if key_id not in self._file.keys:  # it may be new
                self._look_again(0)
            file = self._file
        stored = file.keys.get(key_id)
        expected = stored.sha256 if stored else _NOBODY
        found = hashlib.sha256(secret.encode(errors="replace")).hexdigest()
        is_right = hmac.compare_digest(found, expected)
        if stored is None or not is_right or stored.is_revoked:
            raise Unauthenticated(problem="This API key is not valid")
        limits = file.tenants.get(stored.tenant, Limits())
        quota = self._quotas.of(stored.tenant, limits)
        principal = Principal(stored.tenant, stored.scopes, quota, key_id)
        return _on_behalf(principal, tenant_of(metadata))

    def _look_again(self, after_s: float) -> None:
        now = self._clock()
        if now - self._looked_s < after_s:
            return
        self._looked_s = now
        try:
            stamp = _stamp(self._path)
            if stamp != self._stamp:
                self._stamp = stamp  # a file that is broken is told of once
                self._file = _read(self._path)
                structlog.get_logger().info("api_keys_read", keys=len(self._file.keys))
        except SettingsError as error:
            structlog.get_logger().error("api_keys_unreadable", problem=str(error))


def _on_behalf(principal: Principal, tenant: str) -> Principal:
    """A gateway's key speaks for the tenant that the gateway authenticated, and counted."""
    if not tenant:
        return principal
    principal.require("Calling for another tenant", "delegate")
    return Principal(tenant, principal.scopes, TenantQuota(), principal.key_id)


def tenant_of(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """The tenant that a gateway calls for, as it says; "" where it says none."""
    for key, value in metadata:
        if key == TENANT_METADATA and isinstance(value, bytes):
            return value.decode(errors="backslashreplace")
    return ""


def tenant_behind(identities: Iterable[bytes], metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """Whose a call is where no keys are asked for.

    Who is asked for no key may divide its own cache, and reaches nobody else's.

    Args:
        identities: names in the client's certificate; none where certificates are not asked for,
            and a name of one's own is as good as any.
    """
    return "\0\0".join(
        filter(None, (b"\0".join(identities).decode("latin-1"), tenant_of(metadata)))
    )


def _header(metadata: Iterable[tuple[str, str | bytes]], name: str) -> str:
    for key, value in metadata:
        if key == name and isinstance(value, str):
            return value
    return ""


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise SettingsError(f"cannot read API keys: {error}") from None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _read(path: Path) -> _KeyFile:
    try:
        return _KeyFile.model_validate_json(path.read_bytes())
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "the file"
        raise SettingsError(f"{path} is not a key file: {where}: {problem['msg']}") from None
    except OSError as error:
        raise SettingsError(f"cannot read API keys: {error}") from None
