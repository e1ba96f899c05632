"""The front's side of one engine process: commands out, outputs in, and a watch over it.

One client is one process, from its start to its end. When the process dies, says that it failed, or
takes too long for a step, everything that runs on it ends with ENGINE_LOST and the owner is told;
starting another one is the owner's business.
"""

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable

import structlog
from google.rpc import status_pb2

from runtime_service.engine_core import OnPhase
from runtime_service.engine_interpreter import EngineInterpreter
from runtime_service.engine_messages import (
    AddCredit,
    AddRequest,
    Command,
    EngineStats,
    Failed,
    Loading,
    Ready,
    Shutdown,
    StepOutputs,
)
from runtime_service.engine_process import EngineProcess, EngineSpec, start_engine_process
from runtime_service.engine_transport import PeerGone
from runtime_service.generation import Generation
from runtime_service.metrics import RuntimeMetrics
from runtime_service.sample_text import SampleText
from runtime_service.scheduling.request import Request
from runtime_service.tenant_queue import TenantQueue
from shared.background import Background
from shared.errors import EngineLost, MillraceError, from_status

_SHUTDOWN_S = 5.0

_log = structlog.get_logger()


class EngineClient:
    """Speaks with one engine process; made by `start`.

    Args:
        max_waiting_tokens: of prompts that wait for their first step, from which on none joins them but of tenants with
            less than their share, and as many of those that have no credit for it; 0 = four times the KV cache.
        step_timeout_s: a step that takes longer means that the process hangs.
        on_lost: called once when the process is lost, after everything on it has ended.
    """

    def __init__(
        self,
        process: EngineProcess,
        ready: Ready,
        metrics: RuntimeMetrics,
        max_waiting_tokens: int,
        step_timeout_s: float,
        on_lost: Callable[["EngineClient", MillraceError], None],
    ) -> None:
        self.limits = ready.limits
        self.phases = ready.phases
        self.stats: EngineStats | None = None
        kv_tokens = ready.limits.num_blocks * ready.limits.block_tokens
        self.max_waiting_tokens = max_waiting_tokens or 4 * kv_tokens
        self._process = process
        self._metrics = metrics
        self._step_timeout_s = step_timeout_s
        self._on_lost = on_lost
        self._generations: dict[int, Generation] = {}
        # Those that wait for credit wait for their client: they must not keep out those that wait for the engine.
        self._waiting = TenantQueue(self.max_waiting_tokens)
        self._without_credit = TenantQueue(self.max_waiting_tokens)
        self._num_requests = 0
        self._outbox: list[Command] = []
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_over = False
        self._num_sent = self._num_obeyed = 0
        self._last_sign_s = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._background = Background()
        self._tasks = tuple(
            self._background.run(name, work, on_failure=self._misunderstood)
            for name, work in (("read_engine", self._receive()), ("watch_engine", self._watch()))
        )

    @classmethod
    async def start(
        cls,
        spec: EngineSpec,
        metrics: RuntimeMetrics,
        *,
        waiting: EngineInterpreter | None = None,
        max_waiting_tokens: int,
        load_timeout_s: float,
        step_timeout_s: float,
        on_lost: Callable[["EngineClient", MillraceError], None],
        on_phase: OnPhase = lambda _: None,
    ) -> "EngineClient":
        """A client of a new process that has loaded what `spec` says.

        Args:
            waiting: see `start_engine_process`.
            on_phase: called with the name of each phase of loading that begins.
        Raises:
            MillraceError: what the process says why it cannot.
            EngineLost: it died or took too long.
        """
        process = await start_engine_process(spec, waiting)
        try:
            ready = await _loaded(process, load_timeout_s, on_phase)
        except BaseException:  # whatever it is goes on; a process that nobody holds does not
            await process.stop()
            raise
        return cls(process, ready, metrics, max_waiting_tokens, step_timeout_s, on_lost)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def is_over(self) -> bool:
        """Claims that the process was lost or stopped."""
        return self._is_over

    @property
    def waiting_tokens(self) -> int:
        """Tokens of prompts that wait for their first step, and may take it."""
        return self._waiting.num_tokens

    def check_room(self, num_tokens: int, tenant: str) -> None:
        """Claims that a prompt of so many tokens may wait; however long it is: short ones have no easier way in.

        Raises:
            QueueFull: too many tokens wait already.
        """
        self._waiting.check_room(num_tokens, tenant)

    def new_request_id(self) -> int:
        """A name for a request that this process has not seen."""
        self._num_requests += 1
        return self._num_requests

    def submit(
        self,
        request: Request,
        generation: Generation,
        texts: list[SampleText],
        sends_logprobs: bool,
    ) -> None:
        """Has `request` run; its outputs go to `generation`.

        Raises:
            QueueFull: too many tokens wait already.
            EngineLost: the process is gone.
        """
        if self._is_over:
            raise EngineLost(problem="it has just ended")
        num_tokens = len(request.prompt_token_ids) + len(request.resumed_token_ids)
        queue = self._without_credit if request.credit_tokens == 0 else self._waiting
        queue.check_room(num_tokens, request.cache_salt)
        self._generations[request.request_id] = generation
        queue.add(request.request_id, request.cache_salt, num_tokens)
        self._metrics.prompt_tokens += len(request.prompt_token_ids)
        self._idle.clear()
        self.send(AddRequest(request))
        generation.submitted(self, request, texts, sends_logprobs)

    def send(self, command: Command) -> None:
        """Passes `command` on with everything else that this turn of the event loop brings."""
        if isinstance(command, AddCredit) and (
            taken := self._without_credit.take(command.request_id)
        ):
            self._waiting.add(command.request_id, *taken)
        if not self._outbox:
            self._loop.call_soon(self._flush)
        self._outbox.append(command)

    def forget(self, request_id: int) -> None:
        """Drops what still comes of this request."""
        self._left_queue(request_id)
        self._generations.pop(request_id, None)
        if not self._generations:
            self._idle.set()

    async def wait_idle(self) -> None:
        """Returns when nothing runs."""
        await self._idle.wait()

    def fail_all(self, error: MillraceError) -> int:
        """Ends everything that runs with `error`; gives how many generations that were."""
        running = list(self._generations.values())
        for generation in running:
            generation.fail(error)
        return len(running)

    async def stop(self) -> None:
        """Ends the process; what still runs ends with ENGINE_LOST."""
        if not self._is_over:
            self._process.link.send([Shutdown()])
            self._end(EngineLost(problem="it was stopped"))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), _SHUTDOWN_S)
        await self._process.stop()

    def _flush(self) -> None:
        commands, self._outbox = self._outbox, []
        if not self._is_over:
            self._process.link.send(commands)
            self._num_sent += len(commands)

    def _left_queue(self, request_id: int) -> None:
        self._waiting.take(request_id)
        self._without_credit.take(request_id)

    async def _receive(self) -> None:
        while True:
            try:
                reply = await self._process.link.receive()
            except PeerGone:
                self._lose(EngineLost(problem=await _describe_end(self._process)))
                return
            if isinstance(reply, Failed):
                cause = from_status(status_pb2.Status.FromString(reply.status))
                self._lose(EngineLost(problem=str(cause).rstrip(".")))
                return
            assert isinstance(reply, StepOutputs), "an engine is ready once"
            self._take(reply)

    def _take(self, step: StepOutputs) -> None:
        now_s = time.monotonic()
        generations = self._generations
        for output in step.outputs:
            generation = generations.get(output.request_id)
            if generation is not None:
                if output.num_cached_tokens is not None:
                    self._left_queue(output.request_id)
                generation.on_output(output, now_s)
        self.stats = step.stats
        self._metrics.stepped(step.stats)
        self._last_sign_s = now_s
        self._num_obeyed = step.num_commands

    async def _watch(self) -> None:
        while True:
            pause_s = min(self._step_timeout_s / 4, 1.0)
            due_s = time.monotonic() + pause_s
            await asyncio.sleep(pause_s)
            now_s = time.monotonic()
            self._last_sign_s = without_standstill(self._last_sign_s, due_s, now_s)
            silent_s = now_s - self._last_sign_s
            if not self._is_working():
                self._last_sign_s = time.monotonic()
            elif silent_s > self._step_timeout_s:
                self._lose(EngineLost(problem=f"no step ended for {silent_s:.1f} s"))
                return

    def _is_working(self) -> bool:
        """Claims that a message from the process is due."""
        return self._num_obeyed < self._num_sent or not (self.stats is None or self.stats.is_idle)

    def _lose(self, error: EngineLost) -> None:
        if self._is_over:
            return
        problem = error.fields["problem"]
        _log.error("engine_lost", problem=problem, running=len(self._generations))
        self._end(error)
        self._background.run("end_engine", self._reap())
        self._on_lost(self, error)

    def _misunderstood(self) -> None:
        self._lose(EngineLost(problem="the daemon could not follow what it said"))

    async def _reap(self) -> None:
        await self._process.stop()

    def _end(self, error: EngineLost) -> None:
        self._is_over = True
        current = asyncio.current_task()
        for task in self._tasks:
            if task is not current:
                task.cancel()
        self.fail_all(error)
        self._metrics.engine_ended()


def without_standstill(last_sign_s: float, due_s: float, now_s: float) -> float:
    """When the last sign came, counted as if this process had not stood still from `due_s` to now.

    A machine that is paused, or moved, stops both processes: that nothing was heard then says nothing of the other one.
    """
    return min(last_sign_s + max(now_s - due_s, 0.0), now_s)


async def _loaded(process: EngineProcess, load_timeout_s: float, on_phase: OnPhase) -> Ready:
    """What a process says once it has loaded its engine; raises as `EngineClient.start`."""
    try:
        async with asyncio.timeout(load_timeout_s):
            while isinstance(reply := await process.link.receive(), Loading):
                on_phase(reply.phase)
    except TimeoutError:
        raise EngineLost(problem=f"not loaded within {load_timeout_s} s") from None
    except PeerGone:
        raise EngineLost(problem=await _describe_end(process)) from None
    if isinstance(reply, Failed):
        raise from_status(status_pb2.Status.FromString(reply.status))
    assert isinstance(reply, Ready), f"it began with {type(reply).__name__}"
    return reply


async def _describe_end(process: EngineProcess) -> str:
    """How a process that has closed its link ended, for people; it has ended after this."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(process.wait(), 1.0)
    status = await process.stop()
    if status < 0:
        return f"it was killed by {signal.Signals(-status).name}"
    return f"it exited with status {status}"
