"""One generation, from its start command to its terminal event.

Turns what the engine process reports into what the client reads: text that never holds half a
character or a stop string, finish reasons, usage and timings. What the client has not read yet
gathers here, joined per sample, so a slow reader costs at most the tokens it asked for. Knows
neither calls nor processes: commands to the engine go through `EngineLink`.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextvars import copy_context
from typing import Protocol

import structlog
from millrace.runtime.v1 import runtime_pb2 as pb

from runtime_service.engine_messages import (
    AbortSamples,
    AddCredit,
    Command,
    SampleOutput,
    UpdateRequest,
)
from runtime_service.generation_trace import GenerationTrace, Phases
from runtime_service.metrics import RuntimeMetrics
from runtime_service.sample import Sample
from runtime_service.sample_text import SampleText
from runtime_service.scheduling.request import Request
from shared.errors import MillraceError, to_status
from shared.quotas import GenerationQuota, TenantQuota
from shared.tracing import NO_SPAN, trace_fields

_log = structlog.get_logger()


class EngineLink(Protocol):
    """Where a running generation's commands go."""

    def send(self, command: Command) -> None:
        """Passes `command` on with the next message."""

    def forget(self, request_id: int) -> None:
        """Nothing more is wanted of this request."""


class Generation:
    """One generation of one call.

    Args:
        request_id: the client's name for it; may name another one, elsewhere.
        on_news: called when there are events to take.
        on_end: called once, when the terminal event is there to take.
        quota: what it holds of its tenant's; given back at its end.
    """

    def __init__(
        self,
        request_id: str,
        metrics: RuntimeMetrics,
        on_news: Callable[["Generation"], None],
        on_end: Callable[["Generation"], None],
        quota: GenerationQuota | None = None,
    ) -> None:
        self.request_id = request_id
        self.quota = quota or TenantQuota().open_generation()
        self.error: MillraceError | None = None
        self.is_ended = self._is_told = False
        self.num_unread_tokens = 0
        # The engine that runs it; set before it is submitted.
        self.engine_name = ""
        # Its span, where generations are traced.
        self.trace: GenerationTrace | None = None
        # A timer that ends it, or None; cancelled with it.
        self.deadline: asyncio.TimerHandle | None = None
        # What waits on its behalf for an engine to take it, or None; likewise.
        self.held: asyncio.Task[None] | None = None
        # Whose it is, for the log: it ends wherever its engine or runtime is listened to.
        self._context = copy_context()
        self._metrics = metrics
        self._on_news = on_news
        self._on_end = on_end
        self._started_s = time.monotonic()
        self._submitted_s = self._first_token_s = self._last_token_s = 0.0
        self._queued_s = self._total_s = 0.0
        self._engine: EngineLink | None = None
        self._engine_id = -1
        # What came before the engine had it, joined: a client may say it as often as it likes.
        self._early_update = pb.UpdateGeneration()
        self._early_credit_tokens = 0
        self._samples: list[Sample] = []
        self._num_prompt_tokens = self._num_cached_tokens = 0
        self._seed = 0
        self._sends_logprobs = self._sends_started = False
        self._has_credit_limit = False
        self._finish_without_engine = pb.SampleFinish(reason=pb.FINISH_REASON_CANCELLED)

    # What the runtime says.

    def submitted(
        self, engine: EngineLink, request: Request, texts: list[SampleText], sends_logprobs: bool
    ) -> None:
        """The engine has it now, as `request`; `texts`, one a sample, know the resumed tokens."""
        assert self._engine is None, f"{self.request_id} was submitted twice"
        assert not self.is_ended, f"{self.request_id} was submitted after its end"
        self._engine, self._engine_id = engine, request.request_id
        self._submitted_s = time.monotonic()
        self._samples = [Sample(text) for text in texts]
        self._num_prompt_tokens = len(request.prompt_token_ids)
        self._seed = request.sampling.seed
        self._sends_logprobs = sends_logprobs
        self._sends_started = True
        self._has_credit_limit = request.credit_tokens is not None
        if self._early_update.ListFields():
            self.update(self._early_update)
        if self._early_credit_tokens:
            self._add_credit(self._early_credit_tokens)
        self._on_news(self)

    def resumed_at_end(self, num_prompt_tokens: int, finish: pb.SampleFinish) -> None:
        """What was resumed had ended already: nothing is generated."""
        self._num_prompt_tokens = num_prompt_tokens
        self._sends_started = True
        self._finish_without_engine = finish
        self._end("finished")

    # What the client says.

    def cancel(self) -> None:
        """Ends it with FINISH_REASON_CANCELLED."""
        if not self.is_ended:
            self._abort()
            self._finish_cancelled()

    def update(self, update: pb.UpdateGeneration) -> None:
        """Passes a checked update on."""
        if self._engine is None:
            self._early_update.MergeFrom(update)
            return
        self._engine.send(
            UpdateRequest(
                self._engine_id,
                update.priority if update.HasField("priority") else None,
                update.max_new_tokens if update.HasField("max_new_tokens") else None,
            )
        )

    def credit(self, credit: pb.AddCredit) -> None:
        """Passes checked credit on; means nothing where there is no limit."""
        if self._engine is None:
            self._early_credit_tokens += credit.tokens
        else:
            self._add_credit(credit.tokens)

    # What the world says.

    def fail(self, error: MillraceError) -> None:
        """Ends it with `error`. Text held back is not sent: where it is resumed, it comes again."""
        if not self.is_ended:
            self._abort()
            self.error = error
            self._end(error.reason)

    def abandon(self) -> None:
        """Ends it without an event: nobody is there to read it."""
        if not self.is_ended:
            self._abort()
            self._end("client_gone")

    def on_output(self, output: SampleOutput, now_s: float) -> None:
        """Takes what one of its samples gained in a step."""
        if self.is_ended:
            return
        sample = self._samples[output.sample_index]
        if sample.finish is not None:
            if output.token_ids:  # drawn before the engine knew: no reader pays for them
                self._add_credit(len(output.token_ids))
            return
        token_ids = output.token_ids
        sample.make_room()
        if output.num_cached_tokens is not None:
            self._on_first_output(sample, output)
        num_taken, stop_string = sample.text.feed(token_ids, output.finish == "stop_token")
        if num_taken:
            self._count_tokens(sample, num_taken, now_s)
            sample.num_tokens += num_taken
            sample.token_ids += token_ids[:num_taken]
            if self._sends_logprobs:
                sample.logprobs += output.logprobs[:num_taken]
        if stop_string:
            self._end_sample(output.sample_index, pb.FINISH_REASON_STOP_STRING, stop_string)
            assert self._engine is not None, "an output came before the start was submitted"
            self._engine.send(AbortSamples(self._engine_id, (output.sample_index,)))
        elif output.finish == "stop_token":
            sample.text.flush()
            finish = self._end_sample(output.sample_index, pb.FINISH_REASON_STOP_TOKEN)
            finish.stop_token_id = token_ids[-1]
        elif output.finish:
            assert output.finish == "length", f"unknown finish {output.finish!r}"
            sample.text.flush()
            self._end_sample(output.sample_index, pb.FINISH_REASON_LENGTH)
        if sample.finish is not None and all(s.finish is not None for s in self._samples):
            self._end("finished")
        else:
            self._on_news(self)

    # What the reader takes.

    def take_events(self) -> Iterator[pb.Event]:
        """Everything that happened since the last time, oldest first; may be taken slowly."""
        # What comes while this is being taken is for the next time; so is an end.
        is_last = self.is_ended and not self._is_told
        self._is_told = self.is_ended
        self.num_unread_tokens = 0
        name = self.request_id
        if self._sends_started:
            self._sends_started = False
            started = pb.GenerationStarted(
                seed=self._seed, prompt_tokens=self._num_prompt_tokens, engine=self.engine_name
            )
            yield pb.Event(request_id=name, started=started)
        for index, sample in enumerate(self._samples):
            if sample.has_news:
                yield from sample.take_events(name, index)
        if is_last and self.error is not None:
            yield pb.Event(request_id=name, error=to_status(self.error))
        elif is_last:
            yield pb.Event(request_id=name, finished=self._finished())

    def _on_first_output(self, sample: Sample, output: SampleOutput) -> None:
        sample.prompt_logprobs += output.prompt_logprobs
        self.num_unread_tokens += len(output.prompt_logprobs)
        assert output.num_cached_tokens is not None, "not a sample's first output"
        # Samples share the prompt: what the first one found is what the cache gave.
        if not self._queued_s:
            self._num_cached_tokens = output.num_cached_tokens
            self._queued_s = self._submitted_s - self._started_s + (output.queued_s or 0.0)
            self._metrics.queue_seconds.observe(self._queued_s)

    def _count_tokens(self, sample: Sample, num_tokens: int, now_s: float) -> None:
        self.num_unread_tokens += num_tokens
        metrics = self._metrics
        metrics.generated_tokens += num_tokens
        if sample.last_token_s:
            metrics.inter_token_seconds.observe((now_s - sample.last_token_s) / num_tokens)
        elif not self._first_token_s:
            self._first_token_s = now_s
            metrics.first_token(now_s - self._started_s)
        sample.last_token_s = self._last_token_s = now_s

    def _finish_cancelled(self) -> None:
        for index, sample in enumerate(self._samples):
            if sample.finish is None:
                sample.text.flush(is_whole=False)
                self._end_sample(index, pb.FINISH_REASON_CANCELLED)
        self._end("cancelled")

    def _end_sample(
        self, index: int, reason: pb.FinishReason.ValueType, stop_string: str = ""
    ) -> pb.SampleFinish:
        finish = pb.SampleFinish(sample_index=index, reason=reason, stop_string=stop_string)
        self._samples[index].finish = finish
        return finish

    def _add_credit(self, num_tokens: int) -> None:
        assert self._engine is not None, "credit is passed on before the engine has it"
        if self._has_credit_limit:
            self._engine.send(AddCredit(self._engine_id, num_tokens))

    def _abort(self) -> None:
        if self._engine is not None:
            self._engine.send(AbortSamples(self._engine_id))

    def _end(self, reason: str) -> None:
        self.is_ended = True
        for waiting in (self.deadline, self.held):
            if waiting is not None:
                waiting.cancel()
        if self._engine is not None:
            self._engine.forget(self._engine_id)
        num_generated_tokens = sum(s.num_tokens for s in self._samples)
        self.quota.close(self._num_prompt_tokens + num_generated_tokens)
        self._total_s = total_s = time.monotonic() - self._started_s
        self._metrics.ended(reason, total_s)
        self._context.run(self._tell_end, reason, num_generated_tokens)
        if self.trace is not None:
            self._end_trace(self.trace)
        self._on_end(self)

    def _tell_end(self, reason: str, num_generated_tokens: int) -> None:
        first_s = self._first_token_s - self._started_s if self._first_token_s else None
        _log.info(
            "generation_finished",
            request_id=self.request_id,
            reason=reason,
            sample_reasons=sorted({_reason_name(s.finish) for s in self._samples if s.finish}),
            num_samples=len(self._samples),
            prompt_tokens=self._num_prompt_tokens,
            cached_prompt_tokens=self._num_cached_tokens,
            generated_tokens=num_generated_tokens,
            queued_s=round(self._queued_s, 6),
            first_token_s=first_s and round(first_s, 6),
            duration_s=round(self._total_s, 6),
            **trace_fields(self.trace.span if self.trace else NO_SPAN),
        )

    def _end_trace(self, trace: GenerationTrace) -> None:
        first_step_s = self._started_s + self._queued_s if self._queued_s else 0.0
        phases = Phases(
            self._started_s,
            self._submitted_s,
            first_step_s,
            self._first_token_s,
            self._last_token_s,
            self._started_s + self._total_s,
        )
        reasons = [_reason_name(s.finish) for s in self._samples if s.finish]
        trace.end(phases, self._usage(), reasons, self.error.reason if self.error else "")

    def _finished(self) -> pb.GenerationFinished:
        finished = pb.GenerationFinished(
            samples=[s.finish for s in self._samples if s.finish is not None]
            or [self._finish_without_engine],
            usage=self._usage(),
        )
        timings = finished.timings
        timings.queued.FromNanoseconds(round(self._queued_s * 1e9))
        timings.total.FromNanoseconds(round(self._total_s * 1e9))
        if self._first_token_s:
            first_s = self._first_token_s - self._started_s
            timings.time_to_first_token.FromNanoseconds(round(first_s * 1e9))
        return finished

    def _usage(self) -> pb.Usage:
        return pb.Usage(
            prompt_tokens=self._num_prompt_tokens,
            cached_prompt_tokens=self._num_cached_tokens,
            generated_tokens=sum(s.num_tokens for s in self._samples),
        )


def _reason_name(finish: pb.SampleFinish) -> str:
    return pb.FinishReason.Name(finish.reason).removeprefix("FINISH_REASON_").lower()
