"""Which sequences run how many tokens in the next step: policy, in integers.

    order       higher priority first, then the tenant's turn (turns.py), then arrival, then sample
    a step      decoding sequences, then prompts in order, under way or new, while the budget lasts
    blocks      a prompt takes all of its blocks when it is admitted; a decoding sequence takes one
                when it needs it, from the sequence that comes last in order if none is free
    preemption  the sequence gives up row and blocks, and computes its tokens again later

`schedule` may be called again before `update_from` has read the step before. Steps are read in the
order in which they were scheduled. The device runs steps in order too, so what a preempted sequence
gives up may be used by the next step at once; a finished sequence's row and blocks are given up
when the last step that it is in was read, and what that step drew for it is discarded.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable

from runtime_service.engine_messages import EngineStats, SampleOutput
from runtime_service.limits import RuntimeLimits
from runtime_service.scheduling.kv_cache_manager import KVCacheManager
from runtime_service.scheduling.output import (
    ModelRunnerOutput,
    NewSequence,
    ScheduledSequence,
    SchedulerOutput,
)
from runtime_service.scheduling.request import Request
from runtime_service.scheduling.room import Room
from runtime_service.scheduling.roster import Roster
from runtime_service.scheduling.sequence import Group, Order, Sequence, State
from runtime_service.scheduling.step import Step
from runtime_service.scheduling.tenant_lines import TenantLines
from runtime_service.scheduling.waiting_queue import WaitingQueue


class Scheduler:
    """All generations of one engine.

    Args:
        limits: one sequence of `max_sequence_tokens` must fit into the blocks.
        clock: seconds, for `queued_s`.
    """

    def __init__(self, limits: RuntimeLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self.kv = KVCacheManager(limits.num_blocks, limits.block_tokens)
        assert self.kv.num_blocks_for(limits.max_sequence_tokens) <= limits.num_blocks, (
            "a sequence of the greatest length does not fit into the KV cache"
        )
        self._groups: dict[int, Group] = {}
        self._waiting = WaitingQueue()
        self._lines = TenantLines(self._place)
        self._roster = Roster(limits.max_sequences)
        self._room = Room(self.kv, self._roster, self._preempt)
        self._unread: deque[Step] = deque()
        self._last_read = -1
        self._num_arrivals = self._num_steps = self._num_preemptions = 0
        self._num_waiting = self._waiting_tokens = self._step_tokens = 0
        self._prefix_hit_tokens = self._prefix_query_tokens = 0

    # What clients want.

    def add(self, request: Request) -> list[SampleOutput]:
        """Takes a request, and owns it from now on; returns its end where nothing is left to draw.

        That is so where a stream is resumed whose last token was delivered and whose end was not.
        """
        assert request.request_id not in self._groups, "a request id is used twice"
        group = Group(
            request,
            self._num_arrivals,
            self._clock(),
            self._limits.max_sequence_tokens,
            self.kv.root_name(request.cache_salt),
        )
        first = group.samples[0]
        assert 0 < group.num_prompt_tokens < self._limits.max_sequence_tokens, (
            "a request has no prompt or no room for a token"
        )
        if first.num_tokens >= group.max_tokens:
            return [first.first_output((), "length")]
        self._num_arrivals += 1
        self._groups[request.request_id] = group
        for sample in group.samples:
            self._wait(sample, first.num_tokens if sample is first else 1)
        if group.credit > 0:
            self._lines.join(group, self._num_steps)
        return []

    def abort(self, request_id: int, sample_indices: Iterable[int] = ()) -> None:
        """Ends samples, all where none is named, without an output; those that ended are let be."""
        group = self._groups.get(request_id)
        if group is None:
            return
        for index in tuple(sample_indices) or range(len(group.samples)):
            if group.samples[index].state is not State.FINISHED:
                self._finish(group.samples[index])

    def update(
        self, request_id: int, priority: int | None = None, max_new_tokens: int | None = None
    ) -> list[SampleOutput]:
        """Changes a request; returns the ends of samples that have reached the new limit."""
        group = self._groups.get(request_id)
        if group is None:
            return []
        live = [sample for sample in group.samples if sample.state is not State.FINISHED]
        if priority is not None and priority != group.priority:
            self._lines.change_priority(group, priority, self._num_steps)
        outputs = []
        if max_new_tokens is not None:
            group.limit_new_tokens(max_new_tokens)
            for sample in live:
                if len(sample.token_ids) >= group.max_tokens:
                    outputs.append(sample.output((), "length"))
                    self._finish(sample)
        return outputs

    def credit(self, request_id: int, tokens: int) -> None:
        """Lets a request draw `tokens` more; means nothing where there is no limit."""
        group = self._groups.get(request_id)
        if group is not None and group.request.credit_tokens is not None:
            self._add_credit(group, tokens)

    # The steps.

    def schedule(self) -> SchedulerOutput | None:
        """The next step; None where nothing can run before a step is read or a client speaks."""
        self._roster.compact()
        self._room.make_for(self._waiting.first())
        step = Step(self._num_steps, self._limits.max_step_tokens)
        prompts = self._schedule_decoding(step)
        self._roster.compact()
        for sequence in prompts:
            # A long prompt under way would keep those that come before it out for many steps.
            self._admit(step, before=sequence)
            if step.budget and sequence.state is State.RUNNING:
                self._schedule_prompt(step, sequence)
        self._roster.compact()
        if not step.scheduled:  # those that ran have just stalled, and nobody may ask again
            self._room.make_for(self._waiting.first())
        self._admit(step)
        self._step_tokens = self._limits.max_step_tokens - step.budget
        if not step.scheduled:
            assert not step.new, "a sequence was admitted and does nothing"
            return None
        for group in step.led:
            self._set_leader(group, None)
        self._num_steps += 1
        self._unread.append(step)
        return step.to_output(self._roster.take_freed_rows())

    def update_from(self, drawn: ModelRunnerOutput) -> list[SampleOutput]:
        """What samples gained by the oldest step that was not read yet."""
        step = self._unread.popleft()
        assert drawn.step == step.number, "steps are read out of order"
        self._last_read = step.number
        if drawn.prompt_logprobs:
            step.collect_prompt_logprobs(drawn)
        for sequence, scheduled in step.unsampled:
            self._read_unsampled(sequence, scheduled)
        outputs: list[SampleOutput] = []
        running, finished = State.RUNNING, State.FINISHED
        for sequence, row in zip(step.sampled, drawn.sampled, strict=True):
            if sequence.state is finished:
                self._discard(sequence)
                continue
            assert row.row == sequence.row or sequence.row < 0, "rows came back in another order"
            group = sequence.group
            token_ids = sequence.token_ids
            num_tokens = len(token_ids)
            if num_tokens >= sequence.next_remembered:
                self._remember(sequence, num_tokens)
            (token_id,) = row.token_ids
            token_ids.append(token_id)
            finish = ""
            if token_id in group.end_token_ids:
                finish = "stop_token"
            elif num_tokens + 1 >= group.max_tokens:
                finish = "length"
            if sequence.has_output:  # `Sequence.output`, written out: this is the hot path
                output = SampleOutput(
                    group.request_id, sequence.sample_index, row.token_ids, finish, row.logprobs
                )
            else:
                output = sequence.first_output(row.token_ids, finish, row.logprobs)
            outputs.append(output)
            if finish:
                self._finish(sequence)
            elif sequence.state is not running:
                self._queue_if_ready(sequence)
        return outputs

    def stats(self, is_idle: bool = False) -> EngineStats:
        """The state as the next message reports it."""
        return EngineStats(
            num_waiting=self._num_waiting,
            num_running=self._limits.max_sequences - len(self._roster.free_rows),
            num_free_blocks=self.kv.num_free,
            num_blocks=self._limits.num_blocks,
            waiting_tokens=self._waiting_tokens,
            steps=self._num_steps,
            preemptions=self._num_preemptions,
            prefix_hit_tokens=self._prefix_hit_tokens,
            prefix_query_tokens=self._prefix_query_tokens,
            step_tokens=self._step_tokens,
            is_idle=is_idle,
        )

    # Making a step.

    def _schedule_decoding(self, step: Step) -> list[Sequence]:
        """Adds every decoding sequence; returns those that still compute what is known."""
        prompts = []
        budget, number = step.budget, step.number
        running = State.RUNNING
        add_scheduled, add_sampled = step.scheduled.append, step.sampled.append
        for sequence in self._roster.running:
            if sequence.state is not running:  # preempted in this very loop
                continue
            if not sequence.is_decoding:
                prompts.append(sequence)
                continue
            if not budget:
                break
            new_block_ids: tuple[int, ...] = ()
            num_tokens = sequence.num_tokens
            if num_tokens >= sequence.next_event:
                taken = self._prepare_decoding(sequence)
                if taken is None:
                    continue
                new_block_ids = taken
            add_scheduled(ScheduledSequence(sequence.row, num_tokens - 1, 1, new_block_ids))
            add_sampled(sequence)
            sequence.num_tokens = num_tokens + 1
            sequence.last_step = number
            budget -= 1
        step.budget = budget
        return prompts

    def _prepare_decoding(self, sequence: Sequence) -> tuple[int, ...] | None:
        """Blocks that `sequence` takes to go on; None where it cannot go on now."""
        group = sequence.group
        if sequence.num_tokens >= group.max_tokens:  # its last token is being drawn
            return None
        if group.credit <= 0:
            self._roster.stall(sequence)
            return None
        new_block_ids: tuple[int, ...] = ()
        if sequence.num_tokens > sequence.capacity:
            block = self._room.take_block_for(sequence)
            if block is None:
                return None
            new_block_ids = (block,)
        if group.is_metered:
            group.credit -= 1
        return new_block_ids

    def _schedule_prompt(self, step: Step, sequence: Sequence) -> None:
        """Adds as much of what is known and not computed as the budget allows."""
        start = sequence.num_scheduled
        num_tokens = min(sequence.num_tokens - start, step.budget)
        end = start + num_tokens
        is_sampled = end == sequence.num_tokens
        group = sequence.group
        if is_sampled:
            if group.credit <= 0:
                self._roster.stall(sequence)
                return
            if group.is_metered:
                group.credit -= 1
            sequence.is_decoding = True
            sequence.num_tokens += 1
        scheduled = ScheduledSequence(sequence.row, start, num_tokens, is_sampled=is_sampled)
        step.scheduled.append(scheduled)
        if is_sampled:
            step.sampled.append(sequence)
        else:
            step.unsampled.append((sequence, scheduled))
        step.budget -= num_tokens
        sequence.num_scheduled = end
        sequence.last_step = step.number
        if start < group.num_prompt_tokens <= end:
            sequence.prompt_step = step.number
            if group.leader is sequence:
                step.led.append(group)

    def _admit(self, step: Step, before: Sequence | None = None) -> None:
        """Moves waiting sequences into rows, in order, until one does not fit, or `before` comes."""
        while step.budget and self._roster.free_rows:
            sequence = self._waiting.first()
            if sequence is None or (before is not None and before.order < sequence.order):
                return
            assert sequence.num_tokens == len(sequence.token_ids), "a drawn token was not read"
            shared, num_cached, copied = self._find_cached(step, sequence)
            num_taken = self.kv.num_blocks_for(sequence.num_tokens) - len(shared)
            if not self._room.has(num_taken + self.kv.num_free_among(shared)):
                return
            self.kv.hold(shared)
            blocks = [*shared, *(self.kv.take() for _ in range(num_taken))]
            if copied is not None:
                step.block_copies.append((copied, blocks[len(shared)]))
            self._enter(step, sequence, blocks, num_cached, len(shared))
            self._schedule_prompt(step, sequence)

    def _find_cached(self, step: Step, sequence: Sequence) -> tuple[list[int], int, int | None]:
        """What need not be computed: blocks to share, their tokens and those of a block to copy."""
        group = sequence.group
        shared: list[int] = []
        if group.uses_prefix_cache:
            shared = self.kv.find_prefix(sequence.names, sequence.token_ids)
        size = self._limits.block_tokens
        num_cached = len(shared) * size
        num_forked = min(group.num_prompt_tokens, sequence.num_tokens - 1)
        if num_forked > num_cached:
            for sibling in group.samples:
                # In the step that computes them, the blocks are not there yet to be copied.
                if sibling.row >= 0 and sibling.prompt_step < step.number:
                    whole, rest = divmod(num_forked, size)
                    sequence.names = max(sequence.names, sibling.names[: whole + 1], key=len)
                    copied = sibling.block_ids[whole] if rest else None
                    return sibling.block_ids[:whole], num_forked, copied
        return shared, num_cached, None

    def _enter(
        self, step: Step, sequence: Sequence, blocks: list[int], num_cached: int, num_shared: int
    ) -> None:
        group = sequence.group
        self._stop_waiting(sequence)
        self._lines.came(sequence)
        sequence.row = self._roster.free_rows.pop()
        sequence.block_ids = blocks
        sequence.capacity = len(blocks) * self._limits.block_tokens
        sequence.num_scheduled = num_cached
        sequence.plan_event()
        if group.uses_prefix_cache:
            sequence.next_remembered = (num_shared + 1) * self._limits.block_tokens
        if num_cached >= group.num_prompt_tokens:
            sequence.prompt_step = step.number
        if sequence.queued_s is None:
            sequence.queued_s = self._clock() - group.arrival_s
        if group.num_cached_tokens is None:
            self._lines.begin(group, self._num_steps)
            group.num_cached_tokens = min(num_cached, group.num_prompt_tokens)
            self._prefix_hit_tokens += num_cached
            self._prefix_query_tokens += sequence.num_tokens
        step.new.append(
            NewSequence(
                sequence.row,
                list(sequence.token_ids),
                group.num_prompt_tokens,
                group.request.sampling,
                group.request.stop,
                group.request.first_sample_index + sequence.sample_index,
                num_cached,
                list(blocks),
            )
        )
        self._roster.run(sequence)

    # From state to state.

    def _preempt(self, sequence: Sequence) -> None:
        self._num_preemptions += 1
        self._leave_row(sequence)
        self._wait(sequence, len(sequence.token_ids))

    def _wait(self, sequence: Sequence, waiting_tokens: int) -> None:
        sequence.waiting_tokens = waiting_tokens
        self._num_waiting += 1
        self._waiting_tokens += waiting_tokens
        sequence.state = State.PARKED
        self._queue_if_ready(sequence)

    def _stop_waiting(self, sequence: Sequence) -> None:
        self._num_waiting -= 1
        self._waiting_tokens -= sequence.waiting_tokens

    def _queue_if_ready(self, sequence: Sequence) -> None:
        group = sequence.group
        if (
            sequence.state is State.PARKED
            and group.has_turn
            and sequence.last_step <= self._last_read
            and (group.leader is None or group.leader is sequence)
        ):
            self._waiting.push(sequence)

    def _add_credit(self, group: Group, tokens: int) -> None:
        group.credit += tokens
        if not group.has_turn:
            self._lines.join(group, self._num_steps)
        for sample in group.samples:
            if sample.state is State.STALLED:
                self._roster.run(sample)
            else:
                self._queue_if_ready(sample)

    def _place(self, sequence: Sequence, order: Order) -> None:
        if sequence.state is State.RUNNING:
            self._roster.move(sequence, order)
            return
        sequence.order = order
        if sequence.state is State.QUEUED:
            self._waiting.push(sequence)
        else:
            self._queue_if_ready(sequence)

    def _finish(self, sequence: Sequence) -> None:
        group = sequence.group
        if sequence.row < 0:
            self._stop_waiting(sequence)
        elif sequence.last_step <= self._last_read:
            self._leave_row(sequence)
        else:
            self._roster.stop(sequence)
        sequence.state = State.FINISHED
        group.num_unfinished -= 1
        if not group.num_unfinished:
            del self._groups[group.request_id]
            self._lines.end(group, self._num_steps)
        elif group.leader is sequence:
            live = (sample for sample in group.samples if sample.state is not State.FINISHED)
            self._set_leader(group, next(live))

    def _set_leader(self, group: Group, leader: Sequence | None) -> None:
        group.leader = leader
        for sample in group.samples:
            self._queue_if_ready(sample)

    def _leave_row(self, sequence: Sequence) -> None:
        self.kv.release(sequence.block_ids)
        self._roster.free_row(sequence)

    # Reading a step.

    def _read_unsampled(self, sequence: Sequence, scheduled: ScheduledSequence) -> None:
        num_read = scheduled.start + scheduled.num_tokens
        if sequence.state is State.FINISHED:
            self._release_finished(sequence)
        elif num_read >= sequence.next_remembered:
            self._remember(sequence, num_read)
        self._queue_if_ready(sequence)

    def _discard(self, sequence: Sequence) -> None:
        """Drops a token that was drawn for a sequence that had ended: nothing of it counts."""
        if sequence.group.is_metered:
            self._add_credit(sequence.group, 1)
        self._release_finished(sequence)

    def _release_finished(self, sequence: Sequence) -> None:
        if sequence.row >= 0 and sequence.last_step <= self._last_read:
            self._leave_row(sequence)

    def _remember(self, sequence: Sequence, num_read: int) -> None:
        """Lets the blocks be found that this step made whole."""
        size = self._limits.block_tokens
        begin, end = sequence.next_remembered // size - 1, num_read // size
        self.kv.remember(sequence.names, sequence.token_ids, sequence.block_ids, begin, end)
        sequence.next_remembered = (end + 1) * size
