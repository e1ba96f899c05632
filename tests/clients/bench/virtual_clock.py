"""An event loop whose clock jumps to the next timer: what takes minutes takes no time, exactly."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """Time passes only while nothing can run. Without I/O alone."""

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 0.0

    def time(self) -> float:
        return self._now_s

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self._now_s = max(self._now_s, self._scheduled[0].when())  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


def run_virtually(work: Coroutine[Any, Any, Result]) -> Result:
    """What `work` gives, on a virtual clock that begins at 0."""
    loop = VirtualClockLoop()
    try:
        return loop.run_until_complete(work)
    finally:
        loop.close()
