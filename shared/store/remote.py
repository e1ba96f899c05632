"""A store behind a compile daemon: millrace.artifact.v1 over gRPC.

Listing engines is the compile daemon's own service; finding and reading are ArtifactService's.
Whoever reads verifies the bytes (`pull` does).
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from urllib.parse import urlsplit

import grpc
from millrace.artifact.v1 import artifact_pb2, artifact_pb2_grpc
from millrace.compiler.v1 import compiler_pb2, compiler_pb2_grpc

from shared import errors, wire
from shared.channels import PeerSecurity
from shared.engine import EngineManifest, EngineSelector
from shared.errors import EngineNotFound, InvalidField

Value = TypeVar("Value")

LIST_PAGE_ENGINES = 100


class GrpcStore:
    """An `ArtifactStore` at `address`, `host:port`; connects when it is first used.

    Args:
        timeout_s: how long a lookup may take, and a read may bring nothing; in all a read may take any time.
        peers: how the compile daemon is called.
    """

    def __init__(
        self, address: str, peers: PeerSecurity | None = None, timeout_s: float = 30.0
    ) -> None:
        self.address = address
        self._timeout_s = timeout_s
        # A reader that hears nothing for this long asks whether the other end still lives.
        options = [("grpc.keepalive_time_ms", 20_000), ("grpc.keepalive_timeout_ms", 10_000)]
        self._channel = (peers or PeerSecurity()).channel(address, options)
        self._artifacts = artifact_pb2_grpc.ArtifactServiceStub(self._channel)
        self._compiler = compiler_pb2_grpc.CompilerServiceStub(self._channel)

    @staticmethod
    def from_url(url: str, peers: PeerSecurity | None = None) -> "GrpcStore":
        """The store at a `grpc://host:port` URL.

        Raises:
            InvalidField: the URL has no host, or more than that.
        """
        parts = urlsplit(url)
        if not parts.netloc or parts.path.strip("/") or parts.query:
            raise InvalidField(field="store", problem=f"{url!r} is not grpc://host:port")
        return GrpcStore(parts.netloc, peers)

    def close(self) -> None:
        """Closes the connection."""
        self._channel.close()

    def find(self, selector: EngineSelector, max_format: int = 0) -> EngineManifest | None:
        """The newest engine that fits; see `ArtifactStore`."""
        request = artifact_pb2.FindEngineRequest(
            selector=wire.selector_to_proto(selector), max_format_version=max_format
        )
        try:
            return self._find(request)
        except EngineNotFound:  # how the service says None
            return None

    def get(self, name: str) -> EngineManifest:
        """The engine of that name; see `ArtifactStore`."""
        return self._find(artifact_pb2.FindEngineRequest(name=name))

    def list(self) -> tuple[EngineManifest, ...]:
        """All engines, newest first."""
        engines: list[EngineManifest] = []
        token = ""
        while True:
            request = compiler_pb2.ListEnginesRequest(page_size=LIST_PAGE_ENGINES, page_token=token)
            page = self._call(self._compiler.ListEngines, request)
            engines += [wire.engine_from_proto(engine) for engine in page.engines]
            token = page.next_page_token
            if not token:
                return tuple(engines)

    def read(self, digest: str, offset: int = 0) -> Iterator[bytes]:
        """A blob's bytes, unverified; see `ArtifactStore`.

        Raises:
            CompilerUnreachable: the connection was lost, or nothing came for too long; reading again at the new
                offset resumes.
        """
        while True:
            request = artifact_pb2.ReadBlobRequest(digest=digest, offset_bytes=offset)
            # A daemon that hangs may still answer pings: only a deadline ends every call.
            call = self._artifacts.ReadBlob(request, timeout=self._timeout_s)
            begin = offset
            try:
                for response in call:
                    offset += len(response.data)
                    yield response.data
                return
            except grpc.RpcError as error:
                is_slow = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and offset > begin
                if not is_slow:
                    raise self._error(error) from error
            finally:
                call.cancel()

    def add_tuning(self, engine: EngineManifest, gpu: str, record: bytes) -> EngineManifest:
        """Has the compile daemon keep a GPU's tuning record with the engine; see `EngineStore`.

        Raises:
            CompilerUnreachable: it does not answer.
            TuningRefused, InvalidField: it does not take the record.
        """
        request = compiler_pb2.TuneEngineRequest(name=engine.name, gpu=gpu, record=record)
        return wire.engine_from_proto(self._call(self._compiler.TuneEngine, request).engine)

    def _find(self, request: artifact_pb2.FindEngineRequest) -> EngineManifest:
        return wire.engine_from_proto(self._call(self._artifacts.FindEngine, request).engine)

    def _call(self, method: Callable[..., Value], request: Any) -> Value:
        try:
            return method(request, timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise self._error(error) from error

    def _error(self, error: grpc.RpcError) -> errors.MillraceError:
        return errors.of_compiler(error, self.address)
