"""Where engines come from: the local store, another store, or a build that is asked for.

What this gives lies complete in the local store, ready to be mapped. It knows nothing of serving.
"""

import asyncio
from collections.abc import Callable

import grpc
import structlog
from millrace.compiler.v1 import compiler_pb2 as pb
from millrace.compiler.v1 import compiler_pb2_grpc

from shared import wire
from shared.arch import arch_named
from shared.channels import PeerSecurity
from shared.engine import READABLE_FORMATS, EngineManifest, EngineSelector, Signature
from shared.errors import (
    BlobNotFound,
    BuildNotFound,
    CompilerUnreachable,
    DigestMismatch,
    EngineNotFound,
    EngineNotTrusted,
    FormatMismatch,
    MillraceError,
    StoreUnreachable,
    from_status,
    of_compiler,
)
from shared.signing import TrustedKeys
from shared.store import ArtifactStore, LocalStore, pull
from shared.store.cache import EngineCache
from shared.store.pull import add_tuning_from
from shared.store.remote import GrpcStore
from shared.tracing import trace_metadata

_FIRST_RETRY_S, _LAST_RETRY_S = 0.5, 10.0
# A compile daemon imports torch before it answers its first request.
_ASK_TIMEOUT_S = 60.0
# A machine that vanished says nothing, and a build may say nothing for long: watches are begun anew.
_WATCH_S = 120.0

_LOST = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)

_log = structlog.get_logger()


class _Closed(Exception):
    """Ends a thread of which nobody wants anything any more."""


class EngineSource:
    """Finds engines, and has them built where they are missing.

    Args:
        local: where engines are kept and read from.
        remote: where they are pulled from when `local` lacks them; None where there is no such.
        compiler: `host:port` of a compile daemon that builds what is missing; "" for none.
        peers: how it is called.
        trusted: whose engines may be loaded; None: anybody's.
        cache: `local`, where it is a cache of limited size.
        watch_s: how long one call may watch a build; the next one goes on.
    """

    def __init__(
        self,
        local: LocalStore,
        remote: ArtifactStore | None,
        compiler: str,
        peers: PeerSecurity | None = None,
        trusted: TrustedKeys | None = None,
        cache: EngineCache | None = None,
        watch_s: float = _WATCH_S,
    ) -> None:
        self._local = local
        self._remote = remote
        self._compiler = compiler
        self._peers = peers or PeerSecurity()
        self._trusted = trusted
        self._cache = cache
        self._watch_s = watch_s
        self._is_closed = False

    def close(self) -> None:
        """Breaks off what still asks or reads the other store: threads that wait keep a process from its end."""
        self._is_closed = True
        if isinstance(
            self._remote, GrpcStore
        ):  # the others give up by themselves where nothing comes
            self._remote.close()

    def hold(self, engine: EngineManifest) -> Callable[[], None]:
        """Keeps the engine in a cache that others use too; gives what lets go of it.

        Raises:
            EngineNotFound: it had to go since it was found.
        """
        return self._cache.hold(engine).release if self._cache is not None else _nothing_held

    async def find(
        self,
        selector: EngineSelector,
        model_uri: str,
        on_build: Callable[[], None],
        *,
        may_be_older: bool = True,
    ) -> EngineManifest:
        """The newest engine that fits, complete in the local store.

        Args:
            model_uri: where the checkpoint is; "" where a missing engine is not to be built.
            on_build: called when it has to be built, and when it may take long therefore.
            may_be_older: what is here will do where the newest of a store elsewhere cannot be had.
        Raises:
            EngineNotFound: there is none and it cannot be built.
            FormatMismatch: there are only ones that this runtime cannot read.
            EngineNotTrusted: nobody who is trusted signed it.
            CompilerUnreachable: the compile daemon does not answer.
            MillraceError: the build failed, or the pull; as the compile daemon says.
        """
        engine = await asyncio.to_thread(
            self._find_here_or_there, selector, bool(model_uri), may_be_older
        )
        if engine is None and model_uri and self._compiler:
            on_build()
            await self._build(selector, model_uri)
            engine = await asyncio.to_thread(
                self._find_here_or_there, selector, False, may_be_older
            )
        if engine is None:
            raise EngineNotFound(engine=selector)
        return await asyncio.to_thread(self._ready, engine)

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
                repaired = await asyncio.to_thread(self._pull, self._remote, engine)
                return await asyncio.to_thread(self._ready, repaired)
            except (BlobNotFound, DigestMismatch) as error:
                # The other store is the same one, or as damaged.
                _log.warning("repair_needs_a_build", engine=engine.name, problem=str(error))
        return await self.find(selector, model_uri, on_build)

    def _find_here_or_there(
        self, selector: EngineSelector, will_build: bool, may_be_older: bool
    ) -> EngineManifest | None:
        engine = self._local.find(selector, max(READABLE_FORMATS))
        # A cache's engines are copies: which is the newest, the store elsewhere knows.
        is_copy = self._cache is not None or (engine is not None and not self._is_trusted(engine))
        if self._remote is not None and (engine is None or is_copy):
            try:
                engine = self._find_there(self._remote, selector, engine)
            except MillraceError as error:
                if engine is None or not may_be_older:
                    raise
                _log.warning("newest_engine_not_had", instead=engine.name, problem=str(error))
        if engine is None and not will_build:
            unreadable = self._local.find(selector)
            if unreadable is not None:
                raise FormatMismatch(
                    found=unreadable.format_version,
                    readable=", ".join(map(str, READABLE_FORMATS)),
                )
        return engine

    def _find_there(
        self, remote: ArtifactStore, selector: EngineSelector, here: EngineManifest | None
    ) -> EngineManifest | None:
        """The newest engine of the other store, which lies here then; `here` where that has none that fits."""
        found = remote.find(selector, max(READABLE_FORMATS))
        if found is None or (here is not None and found.manifest == here.manifest):
            return here
        try:
            known = self._local.get(found.name)
        except EngineNotFound:
            known = None
        if known is not None and known.manifest == found.manifest:
            return known
        self._check(found)  # before it is downloaded; and when it is here, once more
        return self._pull(remote, found, known)

    def _pull(
        self, remote: ArtifactStore, engine: EngineManifest, instead: EngineManifest | None = None
    ) -> EngineManifest:
        """`engine` of the other store, which takes the name from `instead`."""
        if self._cache is not None:
            return self._cache.pull(remote, engine, self._go_on, instead)
        return pull(remote, engine, self._local, self._go_on, instead)

    def _go_on(self, num_bytes: int, total_bytes: int) -> None:
        if self._is_closed:
            raise _Closed("the pull was broken off; the next one resumes it")

    def _check(self, engine: EngineManifest) -> None:
        if self._trusted is not None:
            self._trusted.check(engine)

    def _is_trusted(self, engine: EngineManifest) -> bool:
        try:
            self._check(engine)
        except EngineNotTrusted:
            return False
        return True

    def _checked(self, engine: EngineManifest) -> EngineManifest:
        """`engine`, which lies in the local store, unless it is not to be trusted.

        Raises:
            EngineNotTrusted: nobody who is trusted signed it, here or in the other store.
        """
        try:
            self._check(engine)
        except EngineNotTrusted:
            if self._remote is None:
                raise
            # It may have been signed after it was pulled.
            for signature in self._signed_there(engine):
                engine = self._local.add_signature(engine, signature)
            self._check(engine)
        return engine

    def _ready(self, engine: EngineManifest) -> EngineManifest:
        """`engine`, which lies in the local store: one to be trusted, with all tuning records that there are.

        Raises:
            EngineNotTrusted: as `_checked`.
        """
        engine = self._checked(engine)
        if self._remote is None or not arch_named(engine.key.arch).is_gpu:
            return engine
        try:
            # Another runtime may have measured since it was pulled.
            for tuning in set(self._remote.get(engine.name).tunings) - set(engine.tunings):
                engine = add_tuning_from(self._remote, engine, tuning, self._local)
        except MillraceError as error:  # none is needed to serve
            _log.warning("tunings_not_found", engine=engine.name, problem=str(error))
        return engine

    def _signed_there(self, engine: EngineManifest) -> tuple[Signature, ...]:
        assert self._remote is not None, "there is no other store"
        try:
            other = self._remote.get(engine.name)
        except (EngineNotFound, CompilerUnreachable, StoreUnreachable) as error:
            _log.warning("signatures_not_found", engine=engine.name, problem=str(error))
            return ()
        return other.signatures if other.manifest == engine.manifest else ()

    async def _build(self, selector: EngineSelector, model_uri: str) -> None:
        request = pb.BuildEngineRequest(
            model_uri=model_uri,
            archs=[selector.arch],
            quant=wire.quant_to_proto(selector.quant),
            model=selector.model,
        )
        async with self._peers.aio_channel(self._compiler) as channel:
            stub: compiler_pb2_grpc.CompilerServiceAsyncStub
            stub = compiler_pb2_grpc.CompilerServiceStub(channel)
            operation = await self._ask(stub, request)
            while (ended := await self._watch(stub, operation)) is None:
                _log.warning("build_forgotten", operation=operation.name)
                operation = await self._ask(stub, request)
            operation = ended
        if operation.HasField("error"):
            raise from_status(operation.error)
        for build in operation.builds:
            if build.HasField("error"):
                raise from_status(build.error)
            if build.state != pb.BUILD_STATE_SUCCEEDED:
                raise EngineNotFound(engine=selector)

    async def _ask(
        self, stub: "compiler_pb2_grpc.CompilerServiceAsyncStub", request: pb.BuildEngineRequest
    ) -> pb.Operation:
        try:
            asked = stub.BuildEngine(request, timeout=_ASK_TIMEOUT_S, metadata=trace_metadata())
            operation = (await asked).operation
        except grpc.aio.AioRpcError as error:
            raise of_compiler(error, self._compiler) from error
        _log.info("build_requested", operation=operation.name, model=request.model)
        return operation

    async def _watch(
        self, stub: "compiler_pb2_grpc.CompilerServiceAsyncStub", operation: pb.Operation
    ) -> pb.Operation | None:
        """The operation once it has ended; a lost connection is tried again for as long.

        None where nobody knows it any more: Redis came back empty. Asking twice is asking once.
        """
        delay_s = _FIRST_RETRY_S
        stage = ""
        while not _has_ended(operation):
            is_heard = False
            try:
                request = pb.WatchOperationRequest(name=operation.name)
                async for change in stub.WatchOperation(request, timeout=self._watch_s):
                    operation, delay_s, is_heard = change.operation, _FIRST_RETRY_S, True
                    if operation.builds and operation.builds[0].progress.stage != stage:
                        stage = operation.builds[0].progress.stage
                        _log.info("build_progressed", operation=operation.name, stage=stage)
            except grpc.aio.AioRpcError as error:
                problem = of_compiler(error, self._compiler)
                if isinstance(problem, BuildNotFound):
                    return None
                if error.code() not in _LOST:
                    raise problem from error
                # A watch tells the state first: one that brought that was cut off by its own deadline.
                if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and is_heard:
                    continue
                _log.warning("build_watch_lost", operation=operation.name, retry_s=delay_s)
            if not _has_ended(operation):
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, _LAST_RETRY_S)
        return operation


def _nothing_held() -> None:
    """Lets go of an engine in a store that nothing is evicted from."""


def _has_ended(operation: pb.Operation) -> bool:
    if operation.state == pb.OPERATION_STATE_FAILED:
        return True
    running = (pb.BUILD_STATE_QUEUED, pb.BUILD_STATE_RUNNING)
    return operation.state == pb.OPERATION_STATE_RESOLVED and not any(
        build.state in running for build in operation.builds
    )
