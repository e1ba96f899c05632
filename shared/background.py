"""Work that nobody waits for: the one place where a daemon starts it, so that none of it ends without a word.

A task whose result nobody takes dies silently, and with it what it kept up: a daemon would look well, and see nothing
new any more. Work that its starter awaits is a plain task, and its errors are the starter's.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextvars import Context, copy_context
from typing import Any, TypeVar

import structlog
from prometheus_client import Counter

from shared.tracing import leave_span

Result = TypeVar("Result")

FIRST_RETRY_S, LAST_RETRY_S = 0.1, 30.0

FAILURES = Counter(
    "millrace_background_failures",
    "Background work that failed, by task; what keeps a daemon up to date begins again.",
    ["task"],
    registry=None,
)
"""The process's, as its memory is: `daemon_registry` tells it beside that."""

_log = structlog.get_logger()


class Background:
    """What one owner has going on; `close` ends all of it."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def keep(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> asyncio.Task[None]:
        """Has `work` go on until it returns or its task is cancelled, for nobody: no call's context is its own.

        One that fails is logged and counted, and begins again.

        Args:
            name: what the log and Prometheus call it.
        """
        # Prometheus sees a first failure only where it saw none before.
        FAILURES.labels(name)
        return self.own(_kept(name, work), _nobodys_context())

    def run(
        self,
        name: str,
        work: Coroutine[Any, Any, None],
        on_failure: Callable[[], object] | None = None,
        context: Context | None = None,
    ) -> asyncio.Task[None]:
        """Has `work` run once; one that fails is logged and counted.

        Args:
            on_failure: called then: what waits for its effects would wait for ever.
            context: for whom it runs; by default for nobody, whichever call began it.
        """
        FAILURES.labels(name)
        task = self.own(work, context or _nobodys_context())

        def tell(ended: asyncio.Task[None]) -> None:
            if not ended.cancelled() and (error := ended.exception()) is not None:
                FAILURES.labels(name).inc()
                _log.error("background_failed", task=name, exc_info=error)
                if on_failure is not None:
                    on_failure()

        task.add_done_callback(tell)
        return task

    def own(
        self, work: Coroutine[Any, Any, Result], context: Context | None = None
    ) -> asyncio.Task[Result]:
        """Has `work` run, and end with the others; its errors are for whoever waits for it.

        Args:
            context: for whom it runs; by default for whoever began it.
        """
        task = asyncio.get_running_loop().create_task(work, context=context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        """Cancels everything, and returns when it has ended."""
        tasks = self._tasks - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


def _nobodys_context() -> Context:
    """The starter's context without what it says of a call: neither log lines nor spans are the call's."""
    context = copy_context()
    context.run(structlog.contextvars.clear_contextvars)
    context.run(leave_span)
    return context


async def _kept(name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    retry_s = FIRST_RETRY_S
    while True:
        began_s = time.monotonic()
        try:
            return await work()
        except Exception:  # an edge: nobody else hears of it
            if time.monotonic() - began_s > LAST_RETRY_S:
                retry_s = FIRST_RETRY_S
            FAILURES.labels(name).inc()
            _log.exception("background_failed", task=name, retry_s=retry_s)
        await asyncio.sleep(retry_s)
        retry_s = min(2 * retry_s, LAST_RETRY_S)
