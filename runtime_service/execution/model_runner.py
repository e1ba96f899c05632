"""One step after the other on the device: pack, run the graph, draw, remember what was drawn.

Steps run on one thread of their own, in order; `execute` only hands them over. So a step may be
launched before the one before it was read: what that one draws is in the row table by then. What a
request is, nobody here knows.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from runtime_service.execution.executor import Executor
from runtime_service.execution.host_draws import draw, num_scored, pieces, score
from runtime_service.execution.rows import RowTable
from runtime_service.limits import RuntimeLimits
from runtime_service.sampling.noise import DrawTokens, draw_tokens
from runtime_service.scheduling.output import (
    ModelRunnerOutput,
    NewSequence,
    SampledSequence,
    ScheduledSequence,
    SchedulerOutput,
    TokenLogprobs,
)
from runtime_service.scheduling.request import SamplingParams, StopParams

# With a vocabulary of 150,000 the logits of so many tokens take 150 MB.
MAX_LOGIT_ROWS = 256
# An engine that ran less is hardly in use: it takes no time of others for what may not come.
MANY_STEPS = 16


class ModelRunner:
    """Runs steps of one engine.

    Args:
        set_up_thread: called first on the thread that runs the steps.
        preparations: pieces of work that later steps are faster for, each for idle time.
        draw_tokens: how tokens are drawn that are not simply the best.
        max_logit_rows: a step that scores prompts runs in pieces of so many tokens, whose logits are all held.
    """

    def __init__(
        self,
        executor: Executor,
        limits: RuntimeLimits,
        vocab_size: int,
        set_up_thread: Callable[[], None] | None = None,
        preparations: Iterable[Callable[[], object]] = (),
        draw_tokens: DrawTokens = draw_tokens,
        max_logit_rows: int = MAX_LOGIT_ROWS,
    ) -> None:
        self._executor, self._draw_tokens = executor, draw_tokens
        self._limits, self._max_logit_rows = limits, max_logit_rows
        self._rows = RowTable(limits, vocab_size)
        self._preparations = iter(preparations)
        self._num_steps = 0
        self._worker = ThreadPoolExecutor(1, "model-runner", initializer=set_up_thread)

    def execute(self, step: SchedulerOutput) -> Future[ModelRunnerOutput]:
        """Hands the step over and returns at once; `result()` waits for what it draws."""
        self._num_steps += 1
        return self._worker.submit(self._run, step)

    def warm_up(self) -> None:
        """Runs steps of a few shapes, whose results nobody wants, on an empty cache."""
        blocks = list(range(-(-2 // self._limits.block_tokens)))
        sampling = SamplingParams(temperature=1.0)  # whose kernel is to be there too
        new = NewSequence(0, [0, 0], 2, sampling, StopParams(1), 0, 0, blocks)
        prompt = SchedulerOutput(0, (), (new,), (), (ScheduledSequence(0, 0, 2),))
        # The first step of a number of sequences is recorded, the second is the first that is replayed.
        decodes = [
            SchedulerOutput(number, (), (), (), (ScheduledSequence(0, 1, 1),)) for number in (1, 2)
        ]
        free = SchedulerOutput(3, (0,), (), (), ())
        for step in (prompt, *decodes):
            self.execute(step).result()
        self._worker.submit(self._rows.apply, free).result()

    def use_idle_time(self) -> bool:
        """Prepares for steps of other sizes, once there were many steps."""
        if self._num_steps < MANY_STEPS:
            return False
        piece = next(self._preparations, None)
        if piece is None:
            return False
        self._worker.submit(_inferred, piece).result()
        return True

    def close(self) -> None:
        """Ends the thread, after the steps that were handed over."""
        self._worker.shutdown()

    def _run(self, step: SchedulerOutput) -> ModelRunnerOutput:
        with torch.inference_mode():
            self._rows.apply(step)
            if step.block_copies:
                self._executor.copy_blocks(step.block_copies)
            drawn: list[SampledSequence] = []
            scores: dict[int, list[TokenLogprobs]] = {}
            scores_prompts = any(num_scored(self._rows, s) for s in step.scheduled)
            whole = [step.scheduled]
            for piece in pieces(step.scheduled, self._max_logit_rows) if scores_prompts else whole:
                drawn += self._run_piece(piece, scores)
        prompt_logprobs = {row: tuple(entries) for row, entries in scores.items()}
        return ModelRunnerOutput(step.step, tuple(drawn), prompt_logprobs)

    def _run_piece(
        self, scheduled: Sequence[ScheduledSequence], scores: dict[int, list[TokenLogprobs]]
    ) -> list[SampledSequence]:
        """What a part of the step draws; what its prompt tokens are worth is added to `scores`."""
        sampled, scored = self._wanted(scheduled)
        logit_rows = [row for row, _ in sampled]
        logit_rows += [row for rows, _ in scored for row in rows]
        token_ids_T, batch = self._rows.pack(scheduled, logit_rows)
        logits_RV = self._executor.forward(token_ids_T, batch)
        first = len(sampled)
        for rows, sequence in scored:
            logits_TV = logits_RV[first : first + len(rows)]
            scores.setdefault(sequence.row, []).extend(score(self._rows, sequence, logits_TV))
            first += len(rows)
        sequences = [s for _, s in sampled]
        return draw(self._rows, sequences, logits_RV[: len(sampled)], self._draw_tokens)

    def _wanted(
        self, scheduled: Sequence[ScheduledSequence]
    ) -> tuple[list[tuple[int, ScheduledSequence]], list[tuple[range, ScheduledSequence]]]:
        """Packed tokens whose logits are drawn from, and those that score prompt tokens."""
        sampled, scored = [], []
        first = 0
        for sequence in scheduled:
            end = first + sequence.num_tokens
            if sequence.is_sampled:
                sampled.append((end - 1, sequence))
            if count := num_scored(self._rows, sequence):
                scored.append((range(first, first + count), sequence))
            first = end
        return sampled, scored


def _inferred(piece: Callable[[], object]) -> None:
    with torch.inference_mode():
        piece()
