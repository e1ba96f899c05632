"""Where the time of a load goes, also while it goes on: phases, one after the other."""

import time
from collections.abc import Sequence

Phase = tuple[str, float]

FIND, START_PROCESS = "find_engine", "start_process"


class Startup:
    """Phases of the load that goes on, else of the last one.

    `before` is what the daemon did before its first load: (name, seconds).
    """

    def __init__(self) -> None:
        self.before: tuple[Phase, ...] = ()
        self._last: tuple[Phase, ...] = ()
        # Of a load that goes on: what is over, and what began when.
        self._over: tuple[Phase, ...] = ()
        self._now: Phase | None = None
        # What came before its process was started, and when that was.
        self._found: tuple[Phase, ...] = ()
        self._loading_s = 0.0

    @property
    def phases(self) -> tuple[Phase, ...]:
        """(name, seconds), in order; of a load that goes on the last one does too."""
        if self._now is None:
            return self._last
        name, began_s = self._now
        return (*self._over, (name, time.monotonic() - began_s))

    def finding(self) -> None:
        """The engine is looked for, built or pulled."""
        self._over, self._now = self.before, (FIND, time.monotonic())

    def loading(self, found_s: float) -> None:
        """It was found in that time, and its process is started; `began` tells what that does."""
        self._over = self._found = (*self.before, (FIND, found_s))
        self._loading_s = time.monotonic()
        self._now = (START_PROCESS, self._loading_s)

    def began(self, name: str) -> None:
        """Its process is in another phase now; means nothing once the load is over."""
        if self._now is not None:
            now_s = time.monotonic()
            last, began_s = self._now
            self._over, self._now = (*self._over, (last, now_s - began_s)), (name, now_s)

    def loaded(self, phases: Sequence[Phase]) -> None:
        """It is served; `phases` are those that its process has measured."""
        rest = time.monotonic() - self._loading_s - sum(seconds for _, seconds in phases)
        self._last = (*self._found, (START_PROCESS, max(rest, 0.0)), *phases)
        self.before, self._now = (), None

    def failed(self) -> None:
        """Nothing is served by it; the last one counts."""
        self._now = None
