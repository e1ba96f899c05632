"""A model runner without a model: the next token is a function of what the KV cache holds.

`FakeRunner` keeps a KV cache whose entries are hashes of the tokens up to each position; what it
draws follows from the entry before, as in a real model: wrong blocks give wrong tokens. It checks
every rule of the records that cross the boundary, so that a scheduler's mistake cannot hide.
"""

import os
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise

from runtime_service.engine_core import OnPhase
from runtime_service.limits import RuntimeLimits
from runtime_service.scheduling.output import (
    ModelRunnerOutput,
    NewSequence,
    SampledSequence,
    ScheduledSequence,
    SchedulerOutput,
    TokenLogprobs,
)
from runtime_service.scheduling.request import Request, SamplingParams, StopParams

VOCAB_SIZE = 97
_MASK = (1 << 64) - 1


def mix(state: int, value: int) -> int:
    """64 bits that depend on both. Source: Steele et al. 2014, SplitMix64's finalizer."""
    mixed = (state * 0x9E3779B97F4A7C15 + value + 0x632BE59BD9B4E019) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    return mixed ^ (mixed >> 31)


def draw(
    state: int, sampling: SamplingParams, sample_index: int, stop: StopParams, num_generated: int
) -> int:
    """The token that follows a context whose last entry is `state`."""
    token_id = mix(mix(state, sampling.seed), sample_index) % VOCAB_SIZE
    while num_generated < stop.min_new_tokens and token_id in stop.end_token_ids:
        token_id = (token_id + 1) % VOCAB_SIZE
    return token_id


def tokens_alone(request: Request, sample_index: int = 0) -> tuple[tuple[int, ...], str]:
    """What a sample draws when nothing else runs, and why it ends. Resumed tokens are not in it."""
    state = 0
    for token_id in request.prompt_token_ids + request.resumed_token_ids:
        state = mix(state, token_id)
    num_generated = len(request.resumed_token_ids)
    drawn: list[int] = []
    while num_generated < request.stop.max_new_tokens:
        token_id = draw(state, request.sampling, sample_index, request.stop, num_generated)
        drawn.append(token_id)
        if token_id in request.stop.end_token_ids:
            return tuple(drawn), "stop_token"
        state = mix(state, token_id)
        num_generated += 1
    return tuple(drawn), "length"


@dataclass(slots=True)
class _Row:
    new: NewSequence
    token_ids: list[int]
    block_ids: list[int]
    num_computed: int
    # What the cache must hold at each position computed so far.
    states: list[int] = field(default_factory=list)


class FakeStep:
    """A launched step, computed already."""

    def __init__(self, output: ModelRunnerOutput | BaseException) -> None:
        self._output = output

    def result(self) -> ModelRunnerOutput:
        """What it drew."""
        if isinstance(self._output, BaseException):
            raise self._output
        return self._output


class FakeRunner:
    """Runs steps at launch.

    Args:
        fails_at_step: this step's result raises FloatingPointError, as non-finite logits would.
    """

    def __init__(self, limits: RuntimeLimits, fails_at_step: int | None = None) -> None:
        self.num_tokens = 0
        self._limits = limits
        self._fails_at_step = fails_at_step
        self._num_steps = 0
        self._rows: dict[int, _Row] = {}
        self._cache: list[list[int]] = [[0] * limits.block_tokens for _ in range(limits.num_blocks)]
        self._holders: dict[int, set[int]] = defaultdict(set)

    def warm_up(self) -> None:
        """Nothing is cold."""

    def use_idle_time(self) -> bool:
        """Nothing is left to prepare."""
        return False

    def execute(self, step: SchedulerOutput) -> FakeStep:
        """Computes a step, and everything that is wrong with it is an assertion."""
        assert step.step == self._num_steps, "steps are launched out of order"
        self._num_steps += 1
        for row in step.freed_rows:
            for block in self._rows.pop(row).block_ids:
                self._holders[block].discard(row)
        for new in step.new_sequences:
            self._enter(new)
        for source, destination in step.block_copies:
            assert self._holders[source], "a block is copied that nobody holds"
            assert len(self._holders[destination]) == 1, "a copy overwrites a shared block"
            self._cache[destination] = list(self._cache[source])
        return FakeStep(self._compute(step))

    def _enter(self, new: NewSequence) -> None:
        assert 0 <= new.row < self._limits.max_sequences, "no such row"
        assert new.row not in self._rows, "a row is taken that was not freed"
        assert 0 < new.num_prompt_tokens <= len(new.token_ids), "no prompt"
        assert new.num_cached_tokens < len(new.token_ids), "nothing is left to compute"
        row = _Row(new, list(new.token_ids), [], new.num_cached_tokens)
        state = 0
        for token_id in new.token_ids[: new.num_cached_tokens]:
            state = mix(state, token_id)
            row.states.append(state)
        self._rows[new.row] = row
        self._append_blocks(row, new.block_ids)

    def _append_blocks(self, row: _Row, block_ids: tuple[int, ...] | list[int]) -> None:
        for block in block_ids:
            assert 0 <= block < self._limits.num_blocks, "no such block"
            assert block not in row.block_ids, "a block is twice in a table"
            self._holders[block].add(row.new.row)
            row.block_ids.append(block)

    def _compute(self, step: SchedulerOutput) -> ModelRunnerOutput | BaseException:
        assert 0 < step.num_tokens <= self._limits.max_step_tokens, "the budget is exceeded"
        assert len({s.row for s in step.scheduled}) == len(step.scheduled), "a row runs twice"
        self.num_tokens += step.num_tokens
        sampled = []
        prompt_logprobs = {}
        for scheduled in step.scheduled:
            row = self._rows[scheduled.row]
            self._append_blocks(row, scheduled.new_block_ids)
            scored = self._forward(row, scheduled)
            if scored and row.new.sampling.prompt_logprobs:
                prompt_logprobs[scheduled.row] = scored
            if scheduled.is_sampled:
                sampled.append(self._sample(row))
        if step.step == self._fails_at_step:
            return FloatingPointError("logits are not finite")
        return ModelRunnerOutput(step.step, tuple(sampled), prompt_logprobs)

    def _forward(self, row: _Row, scheduled: ScheduledSequence) -> tuple[TokenLogprobs, ...]:
        start, end = scheduled.start, scheduled.start + scheduled.num_tokens
        size = self._limits.block_tokens
        assert scheduled.num_tokens >= 1, "a row runs no token"
        assert start == row.num_computed, "positions are skipped or computed twice"
        assert end <= len(row.token_ids), "a token is computed that is not known"
        assert scheduled.is_sampled == (end == len(row.token_ids)), "sampled too early or too late"
        assert end <= self._limits.max_sequence_tokens, "a sequence is too long"
        assert end <= len(row.block_ids) * size, "a block table is too short"
        for position, state in enumerate(row.states):
            found = self._cache[row.block_ids[position // size]][position % size]
            assert found == state, f"position {position} of a sequence was overwritten or not there"
        scored = []
        for position in range(start, end):
            block = row.block_ids[position // size]
            assert self._holders[block] == {row.new.row}, "a block is written that others hold"
            state = 0
            if position:
                before = row.block_ids[(position - 1) // size]
                state = self._cache[before][(position - 1) % size]
            state = mix(state, row.token_ids[position])
            self._cache[block][position % size] = state
            row.states.append(state)
            if position + 1 < row.new.num_prompt_tokens:
                scored.append(_score(state, row.token_ids[position + 1], row.new.sampling))
        row.num_computed = end
        return tuple(scored)

    def _sample(self, row: _Row) -> SampledSequence:
        new = row.new
        num_generated = len(row.token_ids) - new.num_prompt_tokens
        state = row.states[-1]
        token_id = draw(state, new.sampling, new.sample_index, new.stop, num_generated)
        row.token_ids.append(token_id)
        wants = new.sampling.num_logprobs is not None
        logprobs = (_score(state, token_id, new.sampling),) if wants else ()
        return SampledSequence(new.row, (token_id,), logprobs)


def _score(state: int, token_id: int, sampling: SamplingParams) -> TokenLogprobs:
    top = tuple((rank, -float(rank)) for rank in range(sampling.num_logprobs or 0))
    return TokenLogprobs(token_id, -float(mix(state, token_id) % 1000), 1 + state % 7, top)


def prompt_scores_alone(request: Request) -> tuple[TokenLogprobs, ...]:
    """The prompt's logprobs when nothing else runs."""
    state = 0
    scores = []
    prompt = request.prompt_token_ids
    for token_id, following in pairwise(prompt):
        state = mix(state, token_id)
        scores.append(_score(state, following, request.sampling))
    return tuple(scores)


@dataclass(frozen=True, slots=True)
class FakeEngine:
    """A loaded engine around a `FakeRunner`."""

    runner: FakeRunner
    limits: RuntimeLimits
    phases: tuple[tuple[str, float], ...] = (("load", 0.0),)


def small_limits(
    max_sequence_tokens: int = 256,
    max_sequences: int = 16,
    max_step_tokens: int = 64,
    block_tokens: int = 4,
    num_blocks: int = 512,
) -> RuntimeLimits:
    """Limits for tests."""
    return RuntimeLimits(
        max_sequence_tokens, max_sequences, max_step_tokens, block_tokens, num_blocks,
        kv_dtype="float32", kv_bytes=num_blocks * block_tokens * 8, kv_reason="a test asked for it",
    )  # fmt: skip


def tell_pid() -> None:
    """Writes the id of the process that it is run in to stdout."""
    os.write(1, b"%d\n" % os.getpid())


def load_fake_engine(
    limits: RuntimeLimits, on_phase: OnPhase, fails_at_step: int | None = None
) -> FakeEngine:
    """A loader for `EngineSpec`: `tests.runtime_service.fake_runner:load_fake_engine`."""
    on_phase("load")
    return FakeEngine(FakeRunner(limits, fails_at_step), limits)
