"""One step after the other on a GPU, launched without waiting for any of them.

    sent      what changed in the rows, and (row, start, num_tokens) of each sequence: one copy
    launched  inputs, forward pass and draws; the next step finds what this one drew in the token table
    read      the drawn token ids and their log probabilities, which the draws write to the host's memory; `result()`
              waits for these draws alone

A step that scores prompt tokens runs in pieces whose logits are all read: it waits, and draws on the host. What a
request is, nobody here knows.
"""

from collections.abc import Sequence

import numpy as np
import torch

from kernels.logits.launch import MAX_TOP, REPORT_WORDS
from runtime_service.execution.cuda_graphs import CudaGraphExecutor
from runtime_service.execution.device_rows import DeviceRows
from runtime_service.execution.device_sampler import DeviceSampler
from runtime_service.execution.device_stream import DeviceStream, Mark
from runtime_service.execution.host_draws import draw, num_scored, pieces, score
from runtime_service.limits import RuntimeLimits
from runtime_service.sampling.sampler import NonFiniteLogits
from runtime_service.scheduling.output import (
    ModelRunnerOutput,
    NewSequence,
    SampledSequence,
    ScheduledSequence,
    SchedulerOutput,
    TokenLogprobs,
)
from runtime_service.scheduling.request import SamplingParams, StopParams


class LaunchedStep:
    """A step whose drawn tokens are on their way to the host."""

    def __init__(
        self, step: SchedulerOutput, reading: "Reading", mark: Mark, free: list["Reading"]
    ) -> None:
        self._step, self._reading, self._mark, self._free = step, reading, mark, free
        self._output: ModelRunnerOutput | None = None

    def result(self) -> ModelRunnerOutput:
        """What it drew; waits for it.

        Raises:
            NonFiniteLogits: the logits of a sequence that draws hold NaN or +infinity, or nothing but -infinity.
        """
        if self._output is None:
            self._mark.synchronize()
            sampled = self._reading.sampled(self._step.scheduled)
            self._free.append(self._reading)
            self._output = ModelRunnerOutput(self._step.step, sampled, {})
        return self._output


class Reading:
    """Host memory that a step of at most `max_sequences` draws into."""

    def __init__(self, max_sequences: int, vocab_size: int, stream: DeviceStream) -> None:
        self.drawn_S = stream.host_words(max_sequences)
        self.reports_SW = stream.host_words(max_sequences * REPORT_WORDS).view(-1, REPORT_WORDS)
        # How many of the likeliest tokens those sequences report that do, by place.
        self.num_top: dict[int, int] = {}
        self._vocab_size = vocab_size

    def sampled(self, scheduled: Sequence[ScheduledSequence]) -> tuple[SampledSequence, ...]:
        """What arrived.

        Raises:
            NonFiniteLogits: as `LaunchedStep.result`.
        """
        token_ids = self.drawn_S[: len(scheduled)].tolist()
        sampled = tuple(
            SampledSequence(s.row, (token_id,), self._logprobs(place, token_id))
            for place, (s, token_id) in enumerate(zip(scheduled, token_ids, strict=True))
            if s.is_sampled
        )
        if any(s.token_ids[0] < 0 for s in sampled):
            raise NonFiniteLogits("the model's logits are not finite")
        return sampled

    def _logprobs(self, place: int, token_id: int) -> tuple[TokenLogprobs, ...]:
        if place not in self.num_top:
            return ()
        report = self.reports_SW[place]
        values, words = report.view(torch.float32).tolist(), report.tolist()
        count = min(self.num_top[place], self._vocab_size)
        top = zip(words[2 : 2 + count], values[2 + MAX_TOP : 2 + MAX_TOP + count], strict=True)
        return (TokenLogprobs(token_id, values[0], words[1], tuple(top)),)


class ReadStep:
    """A step whose output is known already."""

    def __init__(self, output: ModelRunnerOutput) -> None:
        self._output = output

    def result(self) -> ModelRunnerOutput:
        """What it drew."""
        return self._output


class CudaModelRunner:
    """Runs steps of one engine on torch's current stream, from the calling thread."""

    def __init__(
        self,
        executor: CudaGraphExecutor,
        rows: DeviceRows,
        sampler: DeviceSampler,
        limits: RuntimeLimits,
        vocab_size: int,
        stream: DeviceStream,
    ) -> None:
        self._executor, self._rows, self._sampler = executor, rows, sampler
        self._limits, self._vocab_size, self._stream = limits, vocab_size, stream
        # One step under way, and one that is read.
        self._free = [self._new_reading() for _ in range(2)]

    def execute(self, step: SchedulerOutput) -> LaunchedStep | ReadStep:
        """Launches the step and returns; waits only where it scores a prompt."""
        with torch.inference_mode():
            self._rows.apply(step)
            if step.block_copies:
                self._executor.copy_blocks(step.block_copies)
            if any(map(self._rows.scores_prompt, step.scheduled)):
                return self._execute_scored(step)
            sent = self._rows.send(step.scheduled)
            logits_SV = self._executor.run(sent)
            reading = self._free.pop() if self._free else self._new_reading()
            reading.num_top = {
                place: self._rows.num_top(step.scheduled[place].row) for place in sent.reporting
            }
            self._sampler.launch(logits_SV, sent, reading.drawn_S, reading.reports_SW)
            return LaunchedStep(step, reading, self._stream.mark(), self._free)

    def warm_up(self) -> None:
        """Runs steps of a few shapes, whose results nobody wants, on an empty cache."""
        with torch.inference_mode():
            self._executor.load_products()
        limits = self._limits
        count = max(1, min(limits.max_step_tokens, limits.max_sequence_tokens - 1))
        blocks = list(range(-(-(count + 1) // limits.block_tokens)))
        random = SamplingParams(temperature=1.0)
        for number, params in enumerate((SamplingParams(), random, SamplingParams(1.0, 2))):
            new = NewSequence(0, [0] * count, count, params, StopParams(1), 0, 0, blocks)
            prompt = SchedulerOutput(number, (), (new,), (), (ScheduledSequence(0, 0, count),))
            decode = SchedulerOutput(number, (), (), (), (ScheduledSequence(0, count, 1),))
            for step in (prompt, decode):
                self.execute(step).result()
            count = 1
        self._rows.apply(SchedulerOutput(0, (0,), (), (), ()))

    def use_idle_time(self) -> bool:
        """Captures one more graph; False where all are captured."""
        with torch.inference_mode():
            return self._executor.capture_next()

    def close(self) -> None:
        """Nothing runs here that would have to be ended."""

    def _new_reading(self) -> Reading:
        return Reading(self._limits.max_sequences, self._vocab_size, self._stream)

    def _execute_scored(self, step: SchedulerOutput) -> ReadStep:
        """The step in pieces that are small enough for all logits of each."""
        sampled: list[SampledSequence] = []
        scores: dict[int, list[TokenLogprobs]] = {}
        for piece in pieces(step.scheduled, self._executor.max_logit_rows):
            sent = self._rows.send(piece, draws=False)
            logits_TV = self._executor.run_for_all_logits(sent).cpu()
            ends = np.cumsum([s.num_tokens for s in piece]).tolist()
            for s, end in zip(piece, ends, strict=True):
                if count := num_scored(self._rows, s):
                    first = end - s.num_tokens
                    scored = score(self._rows, s, logits_TV[first : first + count])
                    scores.setdefault(s.row, []).extend(scored)
            drawing = [(s, end - 1) for s, end in zip(piece, ends, strict=True) if s.is_sampled]
            logits_RV = logits_TV[[row for _, row in drawing]]
            sampled += draw(self._rows, [s for s, _ in drawing], logits_RV)
        prompt_logprobs = {row: tuple(entries) for row, entries in scores.items()}
        return ReadStep(ModelRunnerOutput(step.step, tuple(sampled), prompt_logprobs))
