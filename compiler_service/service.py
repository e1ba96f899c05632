"""CompilerService on the wire: each method decodes, calls one function, encodes."""

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any, TypeVar

import grpc
from millrace.compiler.v1 import compiler_pb2, compiler_pb2_grpc

from compiler_service.build_queue import KEPT, BuildQueue
from compiler_service.build_wire import build_to_proto, operation_to_proto
from compiler_service.compiler import Compiler
from shared.engine import EngineManifest, Signature
from shared.errors import BuildNotFound, Draining, EngineNotFound, InvalidField, RedisUnreachable
from shared.signing import MAX_SIGNATURES, is_signature_of
from shared.store import EngineStore
from shared.tuning import MAX_TUNINGS, is_gpu_name, record_from_json
from shared.wire import engine_to_proto

DEFAULT_PAGE_SIZE = 50
MAX_PAGE_SIZE = 1000

Context = grpc.aio.ServicerContext[Any, Any]
Item = TypeVar("Item")


class CompilerService(compiler_pb2_grpc.CompilerServiceServicer):
    """Serves a compiler, its queue and its store. Set `draining` to end the watches."""

    def __init__(self, compiler: Compiler, queue: BuildQueue, store: EngineStore) -> None:
        self._compiler, self._queue, self._store = compiler, queue, store
        self.draining = asyncio.Event()

    async def BuildEngine(
        self, request: compiler_pb2.BuildEngineRequest, context: Context
    ) -> compiler_pb2.BuildEngineResponse:
        """The operation of the request as it stands."""
        if not request.model_uri:
            raise InvalidField(field="model_uri", problem="must say where the checkpoint is")
        record, builds = await self._compiler.ask(request)
        return compiler_pb2.BuildEngineResponse(operation=operation_to_proto(record, builds))

    async def WatchOperation(
        self, request: compiler_pb2.WatchOperationRequest, context: Context
    ) -> AsyncIterator[compiler_pb2.WatchOperationResponse]:
        """The operation, at every change."""
        async for record, builds in self._until_draining(
            self._compiler.watch_operation(request.name)
        ):
            yield compiler_pb2.WatchOperationResponse(operation=operation_to_proto(record, builds))

    async def GetBuild(
        self, request: compiler_pb2.GetBuildRequest, context: Context
    ) -> compiler_pb2.GetBuildResponse:
        """The build of a name."""
        view = await self._compiler.build(_build_digest(request.name))
        return compiler_pb2.GetBuildResponse(build=build_to_proto(view))

    async def WatchBuild(
        self, request: compiler_pb2.WatchBuildRequest, context: Context
    ) -> AsyncIterator[compiler_pb2.WatchBuildResponse]:
        """The build, at every change."""
        views = self._compiler.watch_build(_build_digest(request.name))
        async for view in self._until_draining(views):
            yield compiler_pb2.WatchBuildResponse(build=build_to_proto(view))

    async def CancelBuild(
        self, request: compiler_pb2.CancelBuildRequest, context: Context
    ) -> compiler_pb2.CancelBuildResponse:
        """The build after it was told to end."""
        view = await self._compiler.cancel(_build_digest(request.name))
        return compiler_pb2.CancelBuildResponse(build=build_to_proto(view))

    async def ListBuilds(
        self, request: compiler_pb2.ListBuildsRequest, context: Context
    ) -> compiler_pb2.ListBuildsResponse:
        """A page of builds."""
        before = _number(request.page_token) if request.page_token else None
        records, following = await self._queue.page(_page_size(request.page_size), before)
        return compiler_pb2.ListBuildsResponse(
            builds=[build_to_proto(record) for record in records],
            next_page_token="" if following is None else str(following),
        )

    async def ListEngines(
        self, request: compiler_pb2.ListEnginesRequest, context: Context
    ) -> compiler_pb2.ListEnginesResponse:
        """A page of engines."""
        size = _page_size(request.page_size)
        engines = sorted(await asyncio.to_thread(self._store.list), key=_age, reverse=True)
        if request.page_token:
            last = _engine_token(request.page_token)
            engines = [engine for engine in engines if _age(engine) < last]
        token = "{}-{}".format(*_age(engines[size - 1])) if len(engines) > size else ""
        return compiler_pb2.ListEnginesResponse(
            engines=[engine_to_proto(engine) for engine in engines[:size]], next_page_token=token
        )

    async def GetEngine(
        self, request: compiler_pb2.GetEngineRequest, context: Context
    ) -> compiler_pb2.GetEngineResponse:
        """The engine of a name, and its build where that is still known."""
        engine = await asyncio.to_thread(self._store.get, request.name)
        response = compiler_pb2.GetEngineResponse(engine=engine_to_proto(engine))
        try:
            record = await self._queue.record(engine.key.digest)
        except RedisUnreachable:  # the engine is what was asked for
            record = None
        if record is not None:
            response.build.CopyFrom(build_to_proto(record))
        return response

    async def DeleteEngine(
        self, request: compiler_pb2.DeleteEngineRequest, context: Context
    ) -> compiler_pb2.DeleteEngineResponse:
        """Nothing, once the engine has no name any more."""
        if not re.fullmatch(r"engines/[0-9a-f]{64}", request.name):
            raise EngineNotFound(engine=request.name)  # no prefixes where something is lost
        await asyncio.to_thread(self._store.delete, request.name)
        return compiler_pb2.DeleteEngineResponse()

    async def SignEngine(
        self, request: compiler_pb2.SignEngineRequest, context: Context
    ) -> compiler_pb2.SignEngineResponse:
        """The engine with the signature that was added."""
        signature = Signature(request.signature.public_key, request.signature.signature)
        engine = await asyncio.to_thread(self._sign, request.name, signature)
        return compiler_pb2.SignEngineResponse(engine=engine_to_proto(engine))

    def _sign(self, name: str, signature: Signature) -> EngineManifest:
        engine = self._store.get(name)
        if not is_signature_of(signature, engine.manifest.digest):
            raise InvalidField(field="signature", problem=f"does not sign {engine.name}")
        if len(engine.signatures) >= MAX_SIGNATURES and signature not in engine.signatures:
            raise InvalidField(field="signature", problem=f"would be one of over {MAX_SIGNATURES}")
        return self._store.add_signature(engine, signature)

    async def TuneEngine(
        self, request: compiler_pb2.TuneEngineRequest, context: Context
    ) -> compiler_pb2.TuneEngineResponse:
        """The engine with the tuning record that was added."""
        engine = await asyncio.to_thread(self._tune, request)
        return compiler_pb2.TuneEngineResponse(engine=engine_to_proto(engine))

    def _tune(self, request: compiler_pb2.TuneEngineRequest) -> EngineManifest:
        engine = self._store.get(request.name)
        if not is_gpu_name(request.gpu):
            raise InvalidField(field="gpu", problem=f"{request.gpu!r} is no name of a GPU")
        record_from_json(request.record, gpu=request.gpu, engine=engine.manifest.digest)
        known = {tuning.title for tuning in engine.tunings}
        if len(known | {request.gpu}) > MAX_TUNINGS:
            raise InvalidField(field="gpu", problem=f"would be one of over {MAX_TUNINGS}")
        return self._store.add_tuning(engine, request.gpu, request.record)

    async def _until_draining(self, items: AsyncIterator[Item]) -> AsyncIterator[Item]:
        """`items`, until the daemon drains: then DRAINING sends the watcher to another one."""
        draining = asyncio.create_task(self.draining.wait())
        try:
            while True:
                following = asyncio.ensure_future(anext(items, None))
                try:
                    await asyncio.wait({following, draining}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    if not following.done():
                        following.cancel()
                        await asyncio.wait({following})
                if following.cancelled():
                    raise Draining()
                item = following.result()
                if item is None:
                    return
                yield item
        finally:
            draining.cancel()


def _build_digest(name: str) -> str:
    if not re.fullmatch(r"builds/[0-9a-f]{64}", name):
        raise BuildNotFound(build=name, kept=KEPT)
    return name.removeprefix("builds/")


def _page_size(asked: int) -> int:
    if asked < 0:
        raise InvalidField(field="page_size", problem="must not be negative")
    return min(asked or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)


def _age(engine: EngineManifest) -> tuple[int, str]:
    return round(engine.created_s * 1_000_000), engine.key.digest


def _engine_token(token: str) -> tuple[int, str]:
    created, _, digest = token.partition("-")
    return _number(created), digest


def _number(token: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", token):
        raise InvalidField(field="page_token", problem="is not one that this service gave")
    return int(token)
