"""ArtifactService: engines and their blobs, for runtimes that do not mount the store.

Decodes, calls the store in a thread, encodes. Blobs are hashed before their first byte is sent;
errors are raised as they are, and put on the wire by the server's interceptor.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
from millrace.artifact.v1 import artifact_pb2, artifact_pb2_grpc

from shared import wire
from shared.engine import EngineManifest
from shared.errors import EngineNotFound, InvalidField
from shared.store import ArtifactStore

Context = grpc.aio.ServicerContext[Any, Any]


class ArtifactService(artifact_pb2_grpc.ArtifactServiceServicer):
    """Serves `store`, read only."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store

    async def FindEngine(
        self, request: artifact_pb2.FindEngineRequest, context: Context
    ) -> artifact_pb2.FindEngineResponse:
        """The engine of a name, or the newest one that fits a selector."""
        engine = await asyncio.to_thread(self._find, request)
        return artifact_pb2.FindEngineResponse(engine=wire.engine_to_proto(engine))

    async def ReadBlob(
        self, request: artifact_pb2.ReadBlobRequest, context: Context
    ) -> AsyncIterator[artifact_pb2.ReadBlobResponse]:
        """A blob from an offset on."""
        chunks = await asyncio.to_thread(self._store.read, request.digest, request.offset_bytes)
        while chunk := await asyncio.to_thread(_next, chunks):
            yield artifact_pb2.ReadBlobResponse(data=chunk)

    def _find(self, request: artifact_pb2.FindEngineRequest) -> EngineManifest:
        match request.WhichOneof("target"):
            case "name":
                return self._store.get(request.name)
            case "selector":
                selector = wire.selector_from_proto(request.selector)
                engine = self._store.find(selector, request.max_format_version)
                if engine is None:
                    raise EngineNotFound(engine=selector)
                return engine
            case _:
                raise InvalidField(field="target", problem="set `name` or `selector`")


def _next(chunks: Iterator[bytes]) -> bytes:
    return next(chunks, b"")
