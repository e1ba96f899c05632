"""The sequences that hold rows: running ones in order, stalled ones, and the rows that are free."""

from bisect import insort
from operator import attrgetter

from runtime_service.scheduling.sequence import Order, Sequence, State

_ORDER = attrgetter("order")


class Roster:
    """`max_sequences` rows.

    `running` is sorted by order. A sequence that leaves stays in the list, with another state,
    until `compact`, which must come before it can be back: a step is made in one pass over the
    list as it was at the start.
    """

    def __init__(self, max_sequences: int) -> None:
        self.running: list[Sequence] = []
        self.stalled: dict[Sequence, None] = {}
        self.free_rows = list(reversed(range(max_sequences)))
        self._freed_rows: list[int] = []
        self._has_left = False
        self._last = -1

    def compact(self) -> None:
        """Drops those that left from `running`."""
        if self._has_left:
            self.running = [s for s in self.running if s.state is State.RUNNING]
            self._has_left = False
        self._last = len(self.running) - 1

    def run(self, sequence: Sequence) -> None:
        """Lets a sequence with a row run, stalled before or new."""
        self.stalled.pop(sequence, None)
        sequence.state = State.RUNNING
        insort(self.running, sequence, key=_ORDER)

    def stall(self, sequence: Sequence) -> None:
        """Stops a running sequence, which keeps what it has."""
        sequence.state = State.STALLED
        self.stalled[sequence] = None
        self._has_left = True

    def stop(self, sequence: Sequence) -> None:
        """Notes that a sequence will not run again in its row."""
        self.stalled.pop(sequence, None)
        self._has_left = True

    def free_row(self, sequence: Sequence) -> None:
        """Frees the row of a sequence that will not run again there."""
        self.stop(sequence)
        self.free_rows.append(sequence.row)
        self._freed_rows.append(sequence.row)
        sequence.leave()

    def take_freed_rows(self) -> tuple[int, ...]:
        """Rows freed since the last time."""
        freed_rows, self._freed_rows = tuple(self._freed_rows), []
        return freed_rows

    def move(self, sequence: Sequence, order: Order) -> None:
        """Gives a sequence another place in the order."""
        self.compact()
        if sequence.state is State.RUNNING:
            self.running.remove(sequence)
        sequence.order = order
        if sequence.state is State.RUNNING:
            self.run(sequence)

    def worst_after(self, sequence: Sequence) -> Sequence | None:
        """One to give way to a running `sequence`: a stalled one, else the last in order.

        None where `sequence` is the last. In a pass over `running`, what comes after `sequence` is
        not yet part of the step.
        """
        if self.stalled:
            return next(reversed(self.stalled))
        while (last := self.running[self._last]).state is not State.RUNNING:
            self._last -= 1
        return last if last is not sequence else None

    def below(self, priority_order: int) -> list[Sequence]:
        """Those that a waiting sequence may displace, first the ones that lose least by it.

        Args:
            priority_order: the first part of the waiting sequence's order.
        """
        below = list(self.stalled)
        for sequence in reversed(self.running):
            if sequence.order[0] <= priority_order:
                break
            below.append(sequence)
        return below
