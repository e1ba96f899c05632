"""One step from when it is made until it is read: who is in it, and what it asks of execution."""

from runtime_service.scheduling.output import (
    ModelRunnerOutput,
    NewSequence,
    ScheduledSequence,
    SchedulerOutput,
)
from runtime_service.scheduling.sequence import Group, Sequence


class Step:
    """A step while it is made, and until it is read.

    `sampled` are the sequences that draw a token, in the order of `scheduled`; `unsampled` come
    with the number of tokens that are computed after it.
    """

    __slots__ = (
        "block_copies", "budget", "led", "new", "number", "sampled", "scheduled", "unsampled"
    )  # fmt: skip

    def __init__(self, number: int, budget: int) -> None:
        self.number = number
        self.budget = budget
        self.new: list[NewSequence] = []
        self.block_copies: list[tuple[int, int]] = []
        self.scheduled: list[ScheduledSequence] = []
        self.sampled: list[Sequence] = []
        self.unsampled: list[tuple[Sequence, ScheduledSequence]] = []
        # Groups whose leader computes the end of the prompt here.
        self.led: list[Group] = []

    def to_output(self, freed_rows: tuple[int, ...]) -> SchedulerOutput:
        """The step as execution takes it."""
        return SchedulerOutput(
            self.number,
            freed_rows,
            tuple(self.new),
            tuple(self.block_copies),
            tuple(self.scheduled),
        )

    def collect_prompt_logprobs(self, drawn: ModelRunnerOutput) -> None:
        """Keeps each position's the first time: after preemption positions are computed again."""
        sampled = (scheduled for scheduled in self.scheduled if scheduled.is_sampled)
        for sequence, scheduled in (*self.unsampled, *zip(self.sampled, sampled, strict=True)):
            kept = sequence.group.prompt_logprobs
            if kept is not None and len(kept) >= scheduled.start:
                scored = drawn.prompt_logprobs.get(scheduled.row, ())
                kept += scored[len(kept) - scheduled.start :]
