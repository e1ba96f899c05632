"""The engine's loop prepares in idle time, never under a step, and never while a command waits."""

from runtime_service.engine_core import EngineCore
from runtime_service.engine_messages import AddRequest, Command, Shutdown, StepOutputs
from runtime_service.scheduling.request import Request, SamplingParams, StopParams
from runtime_service.scheduling.scheduler import Scheduler
from tests.runtime_service.fake_runner import FakeRunner, small_limits


class Preparing(FakeRunner):
    """Has `pieces` of work put off, and counts what is done."""

    pieces = 3
    prepared = 0
    steps_before: tuple[int, ...] = ()

    def use_idle_time(self) -> bool:
        if self.prepared == self.pieces:
            return False
        self.prepared += 1
        self.steps_before += (self._num_steps,)
        return True


class Script:
    """A mailbox: gives a list of commands each time that it is asked, and notes whether it was to wait."""

    def __init__(self, *commands: list[Command]) -> None:
        self._commands = list(commands)
        self.waits: list[bool] = []
        self.sent: list[StepOutputs] = []

    def receive(self, wait: bool) -> list[Command]:
        self.waits.append(wait)
        return self._commands.pop(0) if self._commands else [Shutdown()]

    def send(self, reply: StepOutputs) -> None:
        self.sent.append(reply)


def _run(*commands: list[Command]) -> tuple[Preparing, Script]:
    limits = small_limits()
    runner, mailbox = Preparing(limits), Script(*commands)
    EngineCore(Scheduler(limits), runner, mailbox).run()
    return runner, mailbox


def test_idle_loop_prepares_until_nothing_is_left_and_then_sleeps() -> None:
    runner, mailbox = _run([], [], [], [])
    assert runner.prepared == 3
    assert mailbox.waits == [False, False, False, False, True]


def test_nothing_is_prepared_while_a_sequence_runs() -> None:
    request = Request(0, [1, 2, 3], SamplingParams(), StopParams(4))
    nothing: list[list[Command]] = [[] for _ in range(12)]
    runner, mailbox = _run([AddRequest(request)], *nothing)
    assert runner.prepared == 3
    assert len(set(runner.steps_before)) == 1, "it was prepared between steps"
    assert runner.steps_before[0] >= 4
    finishes = [output.finish for reply in mailbox.sent for output in reply.outputs]
    assert finishes == ["", "", "", "length"]
