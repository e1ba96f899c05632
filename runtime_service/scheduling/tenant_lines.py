"""Which requests have turns: of each priority and tenant those that run, and the first of those that wait."""

from collections import OrderedDict
from collections.abc import Callable

from runtime_service.scheduling.sequence import Group, Order, Sequence, State
from runtime_service.scheduling.turns import Turns


class TenantLines:
    """Lines of requests that have not begun, by arrival. Only the first has a turn: what those before it draw counts.

    `step` is the number of the next step wherever it is asked for.

    Args:
        place: gives a sequence its place in the order; one that may be admitted becomes so then.
    """

    def __init__(self, place: Callable[[Sequence, Order], None]) -> None:
        self._place = place
        self._turns = Turns()
        self._lines: dict[tuple[int, str], OrderedDict[int, Group]] = {}

    @property
    def is_empty(self) -> bool:
        """Claims that no request stands in a line or has a turn."""
        return not self._lines and self._turns.is_empty

    def join(self, group: Group, step: int) -> None:
        """Has a request that may draw wait for its tenant's turns; a no-op on one that does already."""
        line = self._lines.setdefault((group.priority, group.request.cache_salt), OrderedDict())
        line[group.request_id] = group
        if len(line) == 1:
            self._take_turn(group, step)

    def came(self, sequence: Sequence) -> None:
        """A sequence's turn has come: it runs."""
        self._turns.came(sequence.group.priority, sequence.order[1])

    def begin(self, group: Group, step: int) -> None:
        """A request runs for the first time: the next of its tenant's takes its turn."""
        self._leave_line(group, step)
        self._note_shared(group, step)

    def end(self, group: Group, step: int) -> None:
        """A request is no more, wherever it stood."""
        self._leave_line(group, step)
        if group.has_turn:
            self._leave_turn(group, step)

    def change_priority(self, group: Group, priority: int, step: int) -> None:
        """Turns of one priority say nothing in another: it waits for one there, unless it has begun."""
        stood_in_line, had_turn = self._leave_line(group, step), group.has_turn
        if had_turn:
            self._leave_turn(group, step)
            group.has_turn = False
        group.priority = priority
        if stood_in_line:
            for sample in group.samples:
                if sample.state is State.QUEUED:
                    sample.state = State.PARKED
            self.join(group, step)
        elif had_turn:
            self._take_turn(group, step)
            self._note_shared(group, step)

    def _leave_line(self, group: Group, step: int) -> bool:
        """Has the next of its tenant's take its turn; false where `group` did not stand in line."""
        key = group.priority, group.request.cache_salt
        line = self._lines.get(key)
        if line is None or line.pop(group.request_id, None) is None:
            return False
        if not line:
            del self._lines[key]
        elif group.has_turn:
            self._take_turn(next(iter(line.values())), step)
        return True

    def _take_turn(self, group: Group, step: int) -> None:
        """Gives the samples of `group` their places in the order."""
        turn = self._turns.enter(
            group.priority, group.request.cache_salt, group.num_known_tokens, step
        )
        group.has_turn = True
        for sample in group.samples:
            self._place(sample, (-group.priority, turn, group.arrival, sample.sample_index))

    def _leave_turn(self, group: Group, step: int) -> None:
        """Puts its tenant's next turn off by what it drew beside others: a token a sample and shared step at most."""
        num_shared = self._turns.num_shared_steps(group.priority, step)
        most = (num_shared - group.shared_from) * len(group.samples)
        num_tokens = min(group.num_drawn_tokens, most)
        self._turns.leave(group.priority, group.request.cache_salt, num_tokens, step)

    def _note_shared(self, group: Group, step: int) -> None:
        group.shared_from = self._turns.num_shared_steps(group.priority, step)
