"""Drives a scheduler with a `FakeRunner`, any number of steps ahead, and checks what comes out."""

from collections import Counter, deque

from runtime_service.engine_messages import SampleOutput
from runtime_service.limits import RuntimeLimits
from runtime_service.scheduling.request import Request
from runtime_service.scheduling.scheduler import Scheduler
from runtime_service.scheduling.sequence import State
from tests.runtime_service.fake_runner import FakeRunner, FakeStep

Sample = tuple[int, int]


class Drive:
    """A scheduler, its runner, and what each sample gained.

    Args:
        max_unread_steps: launched and not read; 0 is a loop without overlap.
    """

    def __init__(self, limits: RuntimeLimits, max_unread_steps: int = 1) -> None:
        self.scheduler = Scheduler(limits, clock=lambda: 0.0)
        self.runner = FakeRunner(limits)
        self.limits = limits
        self.tokens: dict[Sample, list[int]] = {}
        self.finishes: dict[Sample, str] = {}
        self.outputs: list[SampleOutput] = []
        # Per step: rows to tokens.
        self.steps: list[dict[int, int]] = []
        self._max_unread_steps = max_unread_steps
        self._unread: deque[FakeStep] = deque()

    def add(self, *requests: Request) -> None:
        """Starts requests."""
        for request in requests:
            self.take(self.scheduler.add(request))

    def step(self) -> bool:
        """One turn of the loop; whether anything happened."""
        step = self.scheduler.schedule()
        if step is not None:
            self.steps.append({s.row: s.num_tokens for s in step.scheduled})
            self._unread.append(self.runner.execute(step))
        max_unread = self._max_unread_steps if step is not None else 0
        has_read = len(self._unread) > max_unread
        while len(self._unread) > max_unread:
            self.take(self.scheduler.update_from(self._unread.popleft().result()))
        has_moved = step is not None or has_read
        if not has_moved:
            self._check_progress()
        return has_moved

    def run(self) -> None:
        """Turns until nothing happens; somebody gains something as often as the laws promise."""
        num_turns, num_outputs = 0, len(self.outputs)
        while self.step():
            num_turns += 1
            if len(self.outputs) > num_outputs:
                num_turns, num_outputs = 0, len(self.outputs)
            # Whoever is first in order computes at least one token a step.
            assert num_turns <= self.limits.max_sequence_tokens + 16, "steps, and no token"

    def _check_progress(self) -> None:
        """Progress: the engine may sleep only where nobody has credit, as all fit alone."""
        could_run = [key for key, group in self.scheduler._groups.items() if group.credit > 0]
        assert not could_run, f"requests {could_run} have credit and the engine sleeps"

    def take(self, outputs: list[SampleOutput]) -> None:
        """Notes outputs; a sample gains nothing after its one end."""
        self.outputs += outputs
        for output in outputs:
            sample = (output.request_id, output.sample_index)
            assert sample not in self.finishes, f"{sample} gained something after its end"
            is_first = sample not in self.tokens
            assert is_first == (output.num_cached_tokens is not None), "first outputs say so"
            self.tokens.setdefault(sample, []).extend(output.token_ids)
            if output.finish:
                self.finishes[sample] = output.finish

    def check_blocks(self) -> None:
        """Law 4: every block is free or held exactly as often as block tables name it."""
        scheduler = self.scheduler
        held: Counter[int] = Counter()
        rows = set(scheduler._roster.free_rows)
        assert len(rows) == len(scheduler._roster.free_rows), "a row is free twice"
        live = {s for step in scheduler._unread for s in step.sampled}
        live |= {s for step in scheduler._unread for s, _ in step.unsampled}
        live |= {s for group in scheduler._groups.values() for s in group.samples}
        for sequence in live:
            held.update(sequence.block_ids)
            assert (sequence.row >= 0) == bool(sequence.block_ids), "blocks without a row"
            if sequence.row >= 0:
                assert sequence.row not in rows, "a row is held twice"
                rows.add(sequence.row)
        assert rows == set(range(self.limits.max_sequences)), "a row is lost"
        pool = scheduler.kv.pool
        for block in range(pool.num_blocks):
            assert pool.num_holders(block) == held[block], f"block {block} is not as counted"
        free = pool.free_blocks()
        assert len(free) == pool.num_free
        assert set(free) == {b for b in range(pool.num_blocks) if not held[b]}
        waiting = [s for s in live if s.state in (State.QUEUED, State.PARKED)]
        assert scheduler.stats().num_waiting == len(waiting)
        assert scheduler.stats().waiting_tokens == sum(s.waiting_tokens for s in waiting)

    def check_empty(self) -> None:
        """Nothing is left: every block and row is free."""
        self.check_blocks()
        stats = self.scheduler.stats()
        assert not self.scheduler._groups, "a request was forgotten"
        assert self.scheduler._lines.is_empty, "a tenant or a request was not forgotten"
        assert (stats.num_running, stats.num_waiting, stats.waiting_tokens) == (0, 0, 0)
        assert stats.num_free_blocks == stats.num_blocks
