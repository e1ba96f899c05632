"""Sequences that wait for a row, in the scheduler's order."""

import heapq
from itertools import count

from runtime_service.scheduling.sequence import Order, Sequence, State

_Entry = tuple[Order, int, Sequence]

_LEAST_ENTRIES = 64


class WaitingQueue:
    """A heap that drops entries when they come up and no longer hold.

    A sequence that leaves (state) or changes its place (order) leaves its old entry behind. One
    without credit is parked when it comes up: it is never offered, and holds up nobody. Entries that
    were left behind are dropped when they are as many as the others, for what is before them may wait.
    """

    def __init__(self) -> None:
        self._heap: list[_Entry] = []
        self._pushes = count()
        self._most_entries = _LEAST_ENTRIES

    def push(self, sequence: Sequence) -> None:
        """Queues `sequence` at its order."""
        sequence.state = State.QUEUED
        heapq.heappush(self._heap, (sequence.order, next(self._pushes), sequence))
        if len(self._heap) > self._most_entries:
            self._drop_left_behind()

    def first(self) -> Sequence | None:
        """The next to be admitted, which may draw a token; stays queued."""
        heap = self._heap
        while heap:
            sequence = heap[0][2]
            if _holds(heap[0]):
                if sequence.group.credit > 0:
                    return sequence
                sequence.state = State.PARKED
            heapq.heappop(heap)
        return None

    def _drop_left_behind(self) -> None:
        # Of entries at one place, which a change there and back leaves, one stays.
        holding = {entry[2]: entry for entry in self._heap if _holds(entry)}
        self._heap = list(holding.values())
        heapq.heapify(self._heap)
        self._most_entries = max(2 * len(self._heap), _LEAST_ENTRIES)


def _holds(entry: _Entry) -> bool:
    order, _, sequence = entry
    return sequence.state is State.QUEUED and sequence.order == order
