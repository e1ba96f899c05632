"""The engine's loop: take commands, schedule, launch, read the previous step, publish.

With overlap the device never waits for Python: a step is scheduled and launched while the one
before runs. Without, the same code reads each step before it schedules the next, and gives the same
tokens. The loop knows neither tensors nor text; what it cannot handle ends it.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from runtime_service.engine_messages import (
    AbortSamples,
    AddCredit,
    AddRequest,
    Command,
    SampleOutput,
    Shutdown,
    StepOutputs,
    UpdateRequest,
)
from runtime_service.limits import RuntimeLimits
from runtime_service.scheduling.output import ModelRunnerOutput, SchedulerOutput
from runtime_service.scheduling.scheduler import Scheduler

OnPhase = Callable[[str], None]


class PendingStep(Protocol):
    """A launched step."""

    def result(self) -> ModelRunnerOutput:
        """What it drew; waits for it. Raises what went wrong on the device."""


class ModelRunner(Protocol):
    """Runs steps on the device, in the order in which they are launched."""

    def warm_up(self) -> None:
        """Pays now what the first steps would pay."""

    def execute(self, step: SchedulerOutput) -> PendingStep:
        """Launches a step and returns without waiting for it."""

    def use_idle_time(self) -> bool:
        """Does one short piece of work that makes later steps faster; False where none is left."""


class LoadedEngine(Protocol):
    """An engine on its device."""

    @property
    def runner(self) -> ModelRunner:
        """Runs its steps."""

    @property
    def limits(self) -> RuntimeLimits:
        """What fits."""

    @property
    def phases(self) -> Sequence[tuple[str, float]]:
        """(name, seconds) of loading, in order."""


class Mailbox(Protocol):
    """The way to the front: `engine_transport.EngineSide`."""

    def receive(self, wait: bool) -> list[Command]:
        """Commands that have arrived; at least one where `wait`."""

    def send(self, reply: StepOutputs) -> None:
        """Publishes one message."""


class EngineCore:
    """The loop over one scheduler and one runner.

    Args:
        overlap: launch a step before the previous one is read.
    """

    def __init__(
        self, scheduler: Scheduler, runner: ModelRunner, mailbox: Mailbox, overlap: bool = True
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._mailbox = mailbox
        self._max_unread_steps = 1 if overlap else 0
        self._unread: deque[PendingStep] = deque()
        self._num_commands = 0
        self._is_idle = False
        self._is_stopped = False

    def run(self) -> None:
        """Loops until `Shutdown`. Raises whatever the runner or the mailbox raised."""
        while not self._is_stopped:
            # Idle, with nothing left to prepare: sleeps in the kernel until the front says something.
            has_prepared = self._is_idle and self._runner.use_idle_time()
            commands = self._mailbox.receive(wait=self._is_idle and not has_prepared)
            self._num_commands += len(commands)
            self._step(self._obey(commands), bool(commands))

    def _step(self, outputs: list[SampleOutput], owes_answer: bool) -> None:
        step = self._scheduler.schedule()
        if step is not None:
            self._unread.append(self._runner.execute(step))
        max_unread = self._max_unread_steps if step is not None else 0
        has_read = len(self._unread) > max_unread
        while len(self._unread) > max_unread:
            outputs += self._scheduler.update_from(self._unread.popleft().result())
        was_idle, self._is_idle = self._is_idle, step is None and not has_read
        if outputs or owes_answer or not (was_idle and self._is_idle):
            stats = self._scheduler.stats(self._is_idle)
            self._mailbox.send(StepOutputs(tuple(outputs), stats, self._num_commands))

    def _obey(self, commands: list[Command]) -> list[SampleOutput]:
        """Passes commands to the scheduler; returns what they ended."""
        scheduler = self._scheduler
        outputs: list[SampleOutput] = []
        for command in commands:
            match command:
                case AddRequest(request):
                    outputs += scheduler.add(request)
                case AbortSamples(request_id, sample_indices):
                    scheduler.abort(request_id, sample_indices)
                case UpdateRequest(request_id, priority, max_new_tokens):
                    outputs += scheduler.update(request_id, priority, max_new_tokens)
                case AddCredit(request_id, tokens):
                    scheduler.credit(request_id, tokens)
                case Shutdown():
                    self._is_stopped = True
        return outputs
