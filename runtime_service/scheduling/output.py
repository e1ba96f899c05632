"""The two records that cross the boundary between scheduling and execution.

`SchedulerOutput` says which rows run how many tokens; `ModelRunnerOutput` says which tokens were
drawn. Rows are stable: a sequence keeps its row until the row is in `freed_rows`. Execution keeps a
table of tokens per row: drawn tokens are appended there on the device, so a decode step sends no
token id, and a step can be launched before the previous one was read.

The records made once per row and step are msgspec structs, a tenth of a frozen dataclass's cost.
"""

from dataclasses import dataclass

import msgspec

from runtime_service.scheduling.request import SamplingParams, StopParams


@dataclass(frozen=True, slots=True)
class NewSequence:
    """A sequence that enters the batch: for the first time, or again after preemption.

    Args:
        row: where its state lives, from 0 to max_sequences - 1.
        token_ids: all that is known: prompt, then what was generated before.
        num_prompt_tokens: the first of them; the rest counts as output for penalties.
        sample_index: which of the request's samples; part of the randomness key.
        num_cached_tokens: leading tokens whose keys and values are in `block_ids` already.
        block_ids: the row's block table so far.
    """

    row: int
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    stop: StopParams
    sample_index: int
    num_cached_tokens: int
    block_ids: list[int]


class ScheduledSequence(msgspec.Struct, frozen=True, gc=False):
    """What one row does in this step: computes tokens [start, start + num_tokens).

    Args:
        row: the sequence's row.
        start: tokens computed before this step.
        num_tokens: tokens to compute, at least 1.
        new_block_ids: appended to the row's block table before the step.
        is_sampled: the last token's logits are wanted and one token is drawn from them.
    """

    row: int
    start: int
    num_tokens: int
    new_block_ids: tuple[int, ...] = ()
    is_sampled: bool = True


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One step. Apply in this order: freed rows, new sequences, block copies, compute.

    Args:
        step: counts up from 0.
        freed_rows: rows whose state can be dropped.
        block_copies: (source, destination) block ids: a sample leaves its siblings' partial block.
        scheduled: in packing order.
    """

    step: int
    freed_rows: tuple[int, ...]
    new_sequences: tuple[NewSequence, ...]
    block_copies: tuple[tuple[int, int], ...]
    scheduled: tuple[ScheduledSequence, ...]

    @property
    def num_tokens(self) -> int:
        """T of the step."""
        return sum(s.num_tokens for s in self.scheduled)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """How likely one token was, before temperature and truncation.

    Args:
        rank: 1 is the likeliest.
        top: (token id, log probability), likeliest first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


class SampledSequence(msgspec.Struct, frozen=True, gc=False):
    """What one sampled row drew.

    Args:
        logprobs: one per token where asked for, else empty.
    """

    row: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelRunnerOutput:
    """What a step drew.

    Args:
        sampled: one per scheduled sequence with `is_sampled`, in the step's order.
        prompt_logprobs: by row, for prompt positions that this step computed, in order; the token
            at position p + 1 is scored by position p.
    """

    step: int
    sampled: tuple[SampledSequence, ...]
    prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]]
