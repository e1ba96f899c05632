"""What the compile daemon does when it is asked: resolve, look in the store, queue what is missing.

Engines in the store are answered from it alone, so that a Redis that is away stops only what needs
building. Knows no wire beyond the request that an operation keeps.
"""

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator, Callable
from contextvars import copy_context
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
from millrace.compiler.v1 import compiler_pb2

from compiler_service.build_queue import KEPT, BuildQueue
from compiler_service.build_record import BuildJob
from compiler_service.build_record import events_key as build_events_key
from compiler_service.build_wire import BuildView
from compiler_service.metrics import CompilerMetrics
from compiler_service.operations import (
    FAILED,
    RESOLVED,
    RESOLVING,
    RESOLVING_KEPT_S,
    OperationRecord,
    Operations,
    events_key,
)
from shared.background import Background
from shared.engine import EngineKey, EngineManifest, QuantConfig
from shared.errors import (
    BuildNotFound,
    Draining,
    EngineNotFound,
    Internal,
    MillraceError,
    RedisUnreachable,
    to_status,
)
from shared.log import canonical_line
from shared.store import EngineStore
from shared.tracing import current_traceparent
from shared.wire import quant_from_proto

if TYPE_CHECKING:
    from compiler_service.resolve import ResolvedModel

# A hub may take longer to say what a model is made of; then the operation is resolving.
_AT_ONCE_S = 2.0


class Compiler:
    """Operations and builds over one store and one queue; `close` ends what it resolves.

    Args:
        at_once_s: how long an answer waits for what is known of a model.
    """

    def __init__(
        self,
        queue: BuildQueue,
        operations: Operations,
        store: EngineStore,
        cache_dir: Path,
        metrics: CompilerMetrics,
        at_once_s: float = _AT_ONCE_S,
    ) -> None:
        self._queue, self._operations, self._store = queue, operations, store
        self._cache_dir = cache_dir
        self._metrics, self._at_once_s = metrics, at_once_s
        self._background = Background()
        self._is_closing = threading.Event()

    async def ask(
        self, request: compiler_pb2.BuildEngineRequest
    ) -> tuple[OperationRecord, list[BuildView]]:
        """The operation of `request`: with its builds, or still resolving where files are new.

        Raises:
            MillraceError: the request cannot be met, the queue is full, or Redis is away.
        """
        known = asyncio.create_task(asyncio.to_thread(_resolve_cached, request, self._cache_dir))
        await asyncio.wait({known}, timeout=self._at_once_s)
        resolved = known.result() if known.done() else None
        if resolved is not None:
            return await self._admit(request, resolved)
        record = OperationRecord(request, RESOLVING)
        if await self._operations.begin(record):
            # Its builds are traced, and its lines told, as the call's that began it.
            self._background.run("resolve", self._resolve(record), context=copy_context())
        return record, []

    async def watch_operation(
        self, name: str
    ) -> AsyncIterator[tuple[OperationRecord, list[BuildView]]]:
        """The operation as it stands, then at every change, until all of it has ended.

        Raises:
            BuildNotFound: there is no record of it, or of one of its builds.
        """
        tail = self._queue.tail([events_key(name)])
        await tail.start()
        record = await self._operations.get(name)
        while record.state == RESOLVING:
            yield record, []
            await tail.wait()
            try:
                record = await self._operations.get(name)
            except BuildNotFound:  # the daemon that resolved it is gone: this one does it
                record, _ = await self.ask(record.request)
        waiting = [build_events_key(key.digest) for key, cached in record.keys if not cached]
        tail = self._queue.tail(waiting)
        await tail.start()
        while True:
            views = [await self._view(key, cached) for key, cached in record.keys]
            yield record, views
            if all(isinstance(view, EngineManifest) or view.is_ended for view in views):
                return
            await tail.wait()

    async def build(self, digest: str) -> BuildView:
        """The build of that key digest: its record, else the engine in the store.

        Raises:
            BuildNotFound: there is neither.
        """
        view = await self._queue.record(digest) or await self.engine(digest)
        if view is None:
            raise BuildNotFound(build=f"builds/{digest}", kept=KEPT)
        return view

    async def watch_build(self, digest: str) -> AsyncIterator[BuildView]:
        """The build as it stands, then at every change, up to and with its end."""
        view = await self.build(digest)
        if isinstance(view, EngineManifest):
            yield view
            return
        async for record in self._queue.watch(digest):
            yield record

    async def cancel(self, digest: str) -> BuildView:
        """The build after it was told to end, if it has not ended."""
        view = await self.build(digest)
        if isinstance(view, EngineManifest) or view.is_ended:
            return view
        await self._queue.cancel(digest)
        return await self.build(digest)

    async def engine(self, digest: str) -> EngineManifest | None:
        """The engine of that key digest, None where the store has none."""
        try:
            return await asyncio.to_thread(self._store.get, digest)
        except EngineNotFound:
            return None

    async def close(self) -> None:
        """Ends what this daemon resolves; asking again begins it anew."""
        self._is_closing.set()
        await self._background.close()

    async def _admit(
        self, request: compiler_pb2.BuildEngineRequest, resolved: "ResolvedModel"
    ) -> tuple[OperationRecord, list[BuildView]]:
        """Queues what the store lacks."""
        keys = list(resolved.keys.values())
        engines = {key: await self.engine(key.digest) for key in keys}
        for engine in engines.values():
            if engine is not None and engine.model != resolved.model:
                await asyncio.to_thread(self._store.add_model_name, engine, resolved.model)
        missing = [key for key in keys if engines[key] is None]
        self._metrics.asked.labels("cached").inc(len(keys) - len(missing))
        self._metrics.asked.labels("queued").inc(len(missing))
        record = OperationRecord(
            request, RESOLVED, tuple((key, engines[key] is not None) for key in keys)
        )
        if missing:
            await self._queue.enqueue(
                [
                    BuildJob(
                        request.model_uri,
                        resolved.model,
                        key,
                        request.calibration_uri,
                        current_traceparent(),
                    )
                    for key in missing
                ]
            )
            await self._operations.write(record)
        else:
            await self._write_if_reachable(record)
        views = [engines[key] or await self.build(key.digest) for key in keys]
        return record, views

    async def _write_if_reachable(self, record: OperationRecord) -> None:
        try:
            await self._operations.write(record)
        except RedisUnreachable as error:
            # All of it has ended: only a watch, which is not needed, would miss the record.
            structlog.get_logger().warning("operation_not_recorded", error=str(error))

    async def _resolve(self, record: OperationRecord) -> None:
        """Hashes the checkpoint in a thread, then queues, and tells the operation's watchers."""
        request = record.request
        structlog.contextvars.bind_contextvars(operation=record.name)
        with canonical_line("operation_resolved", model_uri=request.model_uri) as line:
            work = asyncio.create_task(
                asyncio.to_thread(_resolve, request, self._cache_dir, self._on_bytes)
            )
            try:
                while not work.done():
                    await asyncio.wait({work}, timeout=RESOLVING_KEPT_S / 3)
                    await self._renew(record)
                await self._admit(request, work.result())
            except MillraceError as error:
                line["reason"] = error.reason
                await self._fail(record, error)
            except asyncio.CancelledError:
                await self._fail(record, Draining())
                raise
            except Exception:
                structlog.get_logger().exception("resolve_failed_unforeseen")
                await self._fail(record, Internal())
            finally:
                work.cancel()

    async def _renew(self, record: OperationRecord) -> None:
        try:
            await self._operations.renew(record)
        except RedisUnreachable as error:
            structlog.get_logger().warning("operation_not_renewed", error=str(error))

    async def _fail(self, record: OperationRecord, error: MillraceError) -> None:
        failed = dataclasses.replace(record, state=FAILED, error=to_status(error))
        await self._write_if_reachable(failed)

    def _on_bytes(self, _: int) -> None:
        if self._is_closing.is_set():  # the only way to end a thread
            raise Draining()

    async def _view(self, key: EngineKey, cached: bool) -> BuildView:
        engine = await self.engine(key.digest) if cached else None
        return engine or await self.build(key.digest)


def _resolve(
    request: compiler_pb2.BuildEngineRequest, cache_dir: Path, on_bytes: Callable[[int], None]
) -> "ResolvedModel":
    # It imports torch, which takes seconds: a daemon starts without it, and most never need it.
    from compiler_service.resolve import resolve

    return resolve(*_question(request), cache_dir, on_bytes, request.calibration_uri)


def _resolve_cached(
    request: compiler_pb2.BuildEngineRequest, cache_dir: Path
) -> "ResolvedModel | None":
    from compiler_service.resolve import resolve_cached

    return resolve_cached(*_question(request), cache_dir, request.calibration_uri)


def _question(
    request: compiler_pb2.BuildEngineRequest,
) -> tuple[str, list[str], QuantConfig, str]:
    return request.model_uri, list(request.archs), quant_from_proto(request.quant), request.model
