"""Sends a plan to a target, on time, and takes down what happened. Knows neither gRPC nor HTTP.

Time is the running event loop's, and nothing else waits: on a loop whose clock is virtual the same
code measures exactly.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from millrace.cli.bench.timeline import Timeline
from millrace.cli.bench.workload import Planned, prompt_of

# A stream of a closed loop whose request failed waits so long, unless the server names a time.
FAILURE_PAUSE_S = 0.1
# How often the loop's own lateness is looked at.
_LAG_SAMPLE_S = 0.02


class RequestFailed(Exception):
    """A request failed.

    Args:
        reason: for counting: the server's, or the connection's.
        retry_after_s: when the server says that trying again may help.
    """

    def __init__(self, reason: str, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s


class Target(Protocol):
    """A server under load."""

    async def send(self, prompt: list[int], timeline: Timeline) -> None:
        """Sends a request of `timeline.planned`, and notes its tokens as they arrive.

        Raises:
            RequestFailed: it was refused, or its answer broke off.
        """


@dataclass(slots=True)
class Measurement:
    """All that a load went through; times are seconds of the loop's clock.

    Args:
        loop_lag_s: how late the event loop itself ran, sampled.
        failures: one example sentence a reason.
    """

    timelines: list[Timeline] = field(default_factory=list)
    start_s: float = 0.0
    end_s: float = 0.0
    loop_lag_s: list[float] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    is_interrupted: bool = False


class Driver:
    """One load on one target; `run` once.

    Args:
        plan: its requests with moments, or without for a closed loop of `concurrency` streams.
        duration_s: after which nothing more is sent; what runs is finished. None: no limit.
        timeout_s: of a request; None: none.
    """

    def __init__(
        self,
        target: Target,
        plan: Iterator[Planned],
        *,
        concurrency: int | None,
        duration_s: float | None,
        timeout_s: float | None,
        seed: int,
    ) -> None:
        self._target, self._plan = target, plan
        self._concurrency = concurrency
        self._duration_s, self._timeout_s, self._seed = duration_s, timeout_s, seed
        self._stopped = asyncio.Event()
        self.measured = Measurement()
        self.num_running = 0

    def stop(self) -> None:
        """Ends the load now: nothing more is sent, and what runs is broken off."""
        self.measured.is_interrupted = True
        self._stopped.set()

    async def run(self) -> Measurement:
        """What happened, from the first request to the last end, or to `stop`."""
        loop = asyncio.get_running_loop()
        measured = self.measured
        measured.start_s = loop.time()
        lagging = asyncio.create_task(self._watch_lag())
        sending = asyncio.create_task(
            self._open_loop() if self._concurrency is None else self._closed_loop(self._concurrency)
        )
        stopping = asyncio.create_task(self._stopped.wait())
        try:
            await asyncio.wait({sending, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, stopping, lagging):
                task.cancel()
            await asyncio.wait({sending, stopping, lagging})
        if not sending.cancelled():
            sending.result()
        measured.end_s = max(
            (t.end_s for t in measured.timelines if t.is_over), default=loop.time()
        )
        return measured

    async def _open_loop(self) -> None:
        begin_s = self.measured.start_s
        async with asyncio.TaskGroup() as tasks:
            for planned in self._plan:
                assert planned.at_s is not None, "an open loop has moments"
                if self._duration_s is not None and planned.at_s >= self._duration_s:
                    return
                prompt = prompt_of(planned, self._seed)  # made before its moment
                due_s = begin_s + planned.at_s
                await asyncio.sleep(due_s - asyncio.get_running_loop().time())
                tasks.create_task(self._request(prompt, Timeline(planned, due_s)))

    async def _closed_loop(self, concurrency: int) -> None:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(concurrency):
                tasks.create_task(self._stream())

    async def _stream(self) -> None:
        loop = asyncio.get_running_loop()
        for planned in self._plan:
            prompt = prompt_of(planned, self._seed)
            now_s = loop.time()
            if self._duration_s is not None and now_s - self.measured.start_s >= self._duration_s:
                return
            await asyncio.sleep(await self._request(prompt, Timeline(planned, now_s)))

    async def _request(self, prompt: list[int], timeline: Timeline) -> float:
        """Seconds that a client would wait before its next request."""
        loop = asyncio.get_running_loop()
        self.measured.timelines.append(timeline)
        self.num_running += 1
        timeline.start_s = loop.time()
        pause_s = 0.0
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._target.send(prompt, timeline)
            timeline.is_over = True
        except (RequestFailed, TimeoutError) as error:
            reason, pause_s = "TIMEOUT", FAILURE_PAUSE_S
            if isinstance(error, RequestFailed):
                reason, pause_s = error.reason, error.retry_after_s or FAILURE_PAUSE_S
            timeline.is_over, timeline.failure = True, reason
            self.measured.failures.setdefault(reason, str(error) or "It took too long.")
        finally:
            self.num_running -= 1
            timeline.end_s = loop.time()
            timeline.num_tokens = timeline.num_tokens or sum(n for _, n in timeline.arrivals)
        return pause_s

    async def _watch_lag(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due_s = loop.time() + _LAG_SAMPLE_S
            await asyncio.sleep(_LAG_SAMPLE_S)
            self.measured.loop_lag_s.append(max(loop.time() - due_s, 0.0))


async def warm_up(target: Target, requests: list[Planned], seed: int) -> None:
    """Sends `requests` at once, before what is measured.

    Raises:
        RequestFailed: one failed: so would what is measured.
    """
    timelines = [Timeline(planned, 0.0) for planned in requests]
    await asyncio.gather(*(target.send(prompt_of(t.planned, seed), t) for t in timelines))
