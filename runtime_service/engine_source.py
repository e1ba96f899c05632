"""Where engines come from: the local store, another store, or a build that is asked for.

What this gives lies complete in the local store, ready to be mapped. It knows nothing of serving.
"""

import asyncio
from collections.abc import Callable

import grpc
import structlog
from grpc_status import rpc_status
from millrace.compiler.v1 import compiler_pb2 as pb
from millrace.compiler.v1 import compiler_pb2_grpc

from shared import wire
from shared.engine import READABLE_FORMATS, EngineManifest, EngineSelector
from shared.errors import (
    ERRORS,
    BlobNotFound,
    CompilerUnreachable,
    DigestMismatch,
    EngineNotFound,
    FormatMismatch,
    MillraceError,
    from_status,
    reason_of,
)
from shared.store import ArtifactStore, LocalStore, pull

_FIRST_RETRY_S, _LAST_RETRY_S = 0.5, 10.0

_log = structlog.get_logger()


class EngineSource:
    """Finds engines, and has them built where they are missing.

    Args:
        local: where engines are kept and read from.
        remote: where they are pulled from when `local` lacks them; None where there is no such.
        compiler: `host:port` of a compile daemon that builds what is missing; "" for none.
    """

    def __init__(self, local: LocalStore, remote: ArtifactStore | None, compiler: str) -> None:
        self._local = local
        self._remote = remote
        self._compiler = compiler

    async def find(
        self, selector: EngineSelector, model_uri: str, on_build: Callable[[], None]
    ) -> EngineManifest:
        """The newest engine that fits, complete in the local store.

        Args:
            model_uri: where the checkpoint is; "" where a missing engine is not to be built.
            on_build: called when it has to be built, and when it may take long therefore.
        Raises:
            EngineNotFound: there is none and it cannot be built.
            FormatMismatch: there are only ones that this runtime cannot read.
            CompilerUnreachable: the compile daemon does not answer.
            MillraceError: the build failed, or the pull; as the compile daemon says.
        """
        engine = await asyncio.to_thread(self._find_here_or_there, selector, bool(model_uri))
        if engine is None and model_uri and self._compiler:
            on_build()
            await self._build(selector, model_uri)
            engine = await asyncio.to_thread(self._find_here_or_there, selector, False)
        if engine is None:
            raise EngineNotFound(engine=selector)
        return engine

    async def repair(
        self,
        engine: EngineManifest,
        selector: EngineSelector,
        model_uri: str,
        on_build: Callable[[], None],
    ) -> EngineManifest:
        """`engine` with what the local store lacks of it, or else what `find` now gives.

        Raises:
            MillraceError: see `find`; `EngineNotFound` where there is no other copy and no source.
        """
        if self._remote is not None:
            try:
                await asyncio.to_thread(pull, self._remote, engine, self._local)
                return engine
            except (BlobNotFound, DigestMismatch) as error:
                # The other store is the same one, or as damaged.
                _log.warning("repair_needs_a_build", engine=engine.name, problem=str(error))
        return await self.find(selector, model_uri, on_build)

    def _find_here_or_there(
        self, selector: EngineSelector, will_build: bool
    ) -> EngineManifest | None:
        newest_format = max(READABLE_FORMATS)
        engine = self._local.find(selector, newest_format)
        if engine is None and self._remote is not None:
            found = self._remote.find(selector, newest_format)
            if found is not None:
                engine = pull(self._remote, found, self._local)
        if engine is None and not will_build:
            unreadable = self._local.find(selector)
            if unreadable is not None:
                raise FormatMismatch(
                    found=unreadable.format_version,
                    readable=", ".join(map(str, READABLE_FORMATS)),
                )
        return engine

    async def _build(self, selector: EngineSelector, model_uri: str) -> None:
        request = pb.BuildEngineRequest(
            model_uri=model_uri,
            archs=[selector.arch],
            quant=wire.quant_to_proto(selector.quant),
            model=selector.model,
        )
        async with grpc.aio.insecure_channel(self._compiler) as channel:
            stub: compiler_pb2_grpc.CompilerServiceAsyncStub
            stub = compiler_pb2_grpc.CompilerServiceStub(channel)
            try:
                operation = (await stub.BuildEngine(request)).operation
            except grpc.aio.AioRpcError as error:
                raise self._error(error) from error
            _log.info("build_requested", operation=operation.name, engine=str(selector))
            operation = await self._watch(stub, operation)
        if operation.HasField("error"):
            raise from_status(operation.error)
        for build in operation.builds:
            if build.HasField("error"):
                raise from_status(build.error)
            if build.state != pb.BUILD_STATE_SUCCEEDED:
                raise EngineNotFound(engine=selector)

    async def _watch(
        self, stub: "compiler_pb2_grpc.CompilerServiceAsyncStub", operation: pb.Operation
    ) -> pb.Operation:
        """The operation once it has ended; a lost connection is tried again for as long."""
        delay_s = _FIRST_RETRY_S
        stage = ""
        while not _has_ended(operation):
            try:
                async for change in stub.WatchOperation(
                    pb.WatchOperationRequest(name=operation.name)
                ):
                    operation, delay_s = change.operation, _FIRST_RETRY_S
                    if operation.builds and operation.builds[0].progress.stage != stage:
                        stage = operation.builds[0].progress.stage
                        _log.info("build_progressed", operation=operation.name, stage=stage)
            except grpc.aio.AioRpcError as error:
                if error.code() != grpc.StatusCode.UNAVAILABLE:
                    raise self._error(error) from error
                _log.warning("build_watch_lost", operation=operation.name, retry_s=delay_s)
            if not _has_ended(operation):
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, _LAST_RETRY_S)
        return operation

    def _error(self, error: grpc.aio.AioRpcError) -> MillraceError:
        status = rpc_status.from_call(error)
        if status is not None and reason_of(status) in ERRORS:
            return from_status(status)
        problem = f"{error.code().name}: {error.details()}"
        return CompilerUnreachable(address=self._compiler, problem=problem)


def _has_ended(operation: pb.Operation) -> bool:
    if operation.state == pb.OPERATION_STATE_FAILED:
        return True
    running = (pb.BUILD_STATE_QUEUED, pb.BUILD_STATE_RUNNING)
    return operation.state == pb.OPERATION_STATE_RESOLVED and not any(
        build.state in running for build in operation.builds
    )
