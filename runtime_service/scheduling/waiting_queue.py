"""Sequences that wait for a row, highest priority first, then in order of arrival."""

import heapq
from itertools import count

from runtime_service.scheduling.sequence import Sequence, State


class WaitingQueue:
    """A heap that drops entries when they come up and no longer hold.

    A sequence that leaves (state) or changes its place (order) leaves its old entry behind. One
    without credit is parked when it comes up: it is never offered, and holds up nobody.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int, int], int, Sequence]] = []
        self._pushes = count()

    def push(self, sequence: Sequence) -> None:
        """Queues `sequence` at its order."""
        sequence.state = State.QUEUED
        heapq.heappush(self._heap, (sequence.order, next(self._pushes), sequence))

    def first(self) -> Sequence | None:
        """The next to be admitted, which may draw a token; stays queued."""
        heap = self._heap
        while heap:
            order, _, sequence = heap[0]
            if sequence.state is State.QUEUED and sequence.order == order:
                if sequence.group.credit > 0:
                    return sequence
                sequence.state = State.PARKED
            heapq.heappop(heap)
        return None
