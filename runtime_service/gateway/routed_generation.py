"""One client's generation, wherever it runs.

It remembers what a resumption needs: the start, the seed, and the ids of the tokens that were
passed on. A runtime that is lost costs nothing but time: the rest is drawn elsewhere, from the same
seed at the same positions, and its text goes on where it broke off, for a runtime that resumes
knows the text of the tokens before. Knows no call and no runtime: runs are placed by `Placer`.
"""

import time
from array import array
from asyncio import TimerHandle
from collections.abc import Iterable, Iterator
from contextvars import copy_context
from dataclasses import dataclass, field
from typing import Protocol

from millrace.runtime.v1 import runtime_pb2 as pb

from runtime_service.gateway.run import Run
from runtime_service.generation_call import OnMember
from runtime_service.sample import join_chunks
from runtime_service.validation import MAX_CREDIT
from shared.errors import EngineLost, MillraceError, to_status
from shared.quotas import GenerationQuota, TenantQuota
from shared.tracing import NO_SPAN

# A generation that takes its engine down with it is not tried on every runtime of the fleet: after
# this many losses in a row without a token it is given up.
MAX_LOSSES = 3
# As measured: what one takes beside its prompt and its tokens, and a token, of a prompt or drawn.
KEPT_GENERATION_BYTES, _KEPT_TOKEN_BYTES = 6 << 10, 8


class Placer(Protocol):
    """Where runs are started, and who is told how generations end."""

    def place(self, run: Run) -> None:
        """Starts `run` on a runtime, now or when there is one; or ends its generation."""

    def ended(self, generation: "RoutedGeneration", reason: str) -> None:
        """Takes note."""

    def recovered(self, generation: "RoutedGeneration") -> None:
        """Takes note that it has a token again after a loss."""

    def first_token(self, seconds: float) -> None:
        """Takes note of how long a generation waited for its first token."""


@dataclass(slots=True)
class SampleRecord:
    """What the client was sent of one sample.

    Token ids are kept for long: as an array they take 4 bytes each, as a list 40.
    """

    token_ids: "array[int]" = field(default_factory=lambda: array("I"))
    finish: pb.SampleFinish | None = None
    # The last event that waits to be read, which what comes next may join.
    last_unread: pb.Event | None = None


class RoutedGeneration:
    """One generation of one call; see `GenerationCall`."""

    def __init__(
        self,
        request_id: str,
        placer: Placer,
        on_news: OnMember,
        on_end: OnMember,
        quota: GenerationQuota | None = None,
    ) -> None:
        self.request_id = request_id
        self.quota = quota or TenantQuota().open_generation()
        self.error: MillraceError | None = None
        self.deadline: TimerHandle | None = None
        self.num_unread_tokens = 0
        self.is_ended = False
        self.span = NO_SPAN
        # Set by `begin`.
        self.start = pb.StartGeneration()
        self.cache_salt = self.generation_id = ""
        self.samples: list[SampleRecord] = []
        self.started: pb.GenerationStarted | None = None
        self.started_s = time.monotonic()
        self.first_token_s = 0.0
        # Whose it is, for the log: it ends wherever its engine or runtime is listened to.
        self.context = copy_context()
        self._placer = placer
        self._on_news, self._on_end = on_news, on_end
        self._runs: list[Run] = []
        self._unread: list[pb.Event] = []
        self._usage = pb.Usage()
        self._queued_s = 0.0
        self._num_prompt_logprobs = 0
        self._num_losses = 0
        # Tokens that count in the quota of the generation in whose place it comes.
        self._num_counted = 0
        self._credit_left: int | None = None
        self._is_cancelled = False

    # How it begins.

    def begin(self, start: pb.StartGeneration, cache_salt: str, generation_id: str) -> None:
        """Has a checked start run; its seed is set, and its deadline is kept elsewhere."""
        self.start, self.cache_salt, self.generation_id = start, cache_salt, generation_id
        self._credit_left = start.credit_tokens if start.HasField("credit_tokens") else None
        self.samples = [SampleRecord() for _ in range(start.sampling.n or 1)]
        self._add_run(Run(self, 0, len(self.samples), self._credit_left))

    def continue_from(self, old: "RoutedGeneration", received: list[int]) -> None:
        """Goes on where a client of `old` has that many tokens of each sample."""
        self.start, self.cache_salt = old.start, old.cache_salt
        self.generation_id = old.generation_id
        self.started_s, self.first_token_s = old.started_s, old.first_token_s
        self.started = old.started
        self._num_counted = old.num_used(received)
        if self.started is not None:
            self._tell(started=self.started)
        for sample, num_tokens in zip(old.samples, received, strict=True):
            self.samples.append(SampleRecord(sample.token_ids[:num_tokens]))
        if any(received):
            self._split(range(len(self.samples)))
        else:
            self._add_run(Run(self, 0, len(self.samples), self._credit_left))

    def limit_credit(self, credit_tokens: int | None) -> None:
        """Sets what the client takes; call before it begins. None: no limit."""
        self._credit_left = credit_tokens

    # What the client says.

    def cancel(self) -> None:
        """Ends it with FINISH_REASON_CANCELLED, once its runtimes have said what they had."""
        if self.is_ended or self._is_cancelled:
            return
        self._is_cancelled = True
        for run in list(self._runs):
            if not run.cancel():
                self._run_ended(run)
        self._finish_if_done()

    def update(self, update: pb.UpdateGeneration) -> None:
        """Follows a checked update, here and wherever it may go on."""
        if update.HasField("priority"):
            self.start.priority = update.priority
        if update.HasField("max_new_tokens"):
            self.start.stop.max_new_tokens = update.max_new_tokens
        for run in self._runs:
            run.update(update)

    def credit(self, credit: pb.AddCredit) -> None:
        """Passes checked credit on; means nothing where there is no limit."""
        if self._credit_left is not None:
            self._credit_left += credit.tokens
            self._share_credit(credit.tokens)

    # What the world says.

    def fail(self, error: MillraceError) -> None:
        """Ends it with `error`."""
        if not self.is_ended:
            self.error = error
            self._tell(error=to_status(error))
            self._end(error.reason)

    def abandon(self) -> None:
        """Ends it without an event: nobody is there to read it, or its client goes on elsewhere."""
        # It may be kept for long, and nobody takes these any more.
        self._unread.clear()
        for sample in self.samples:
            sample.last_unread = None
        if not self.is_ended:
            self._end("client_gone")

    def num_used(self, num_tokens: Iterable[int]) -> int:
        """What it had cost when its samples had that many tokens, in tokens: the prompt too."""
        return sum(num_tokens) + (self.started.prompt_tokens if self.started is not None else 0)

    @property
    def has_tokens(self) -> bool:
        """Claims that a token of it was drawn."""
        return any(sample.token_ids for sample in self.samples)

    @property
    def num_tokens(self) -> int:
        """Tokens that its client was sent, over all samples."""
        return sum(len(sample.token_ids) for sample in self.samples)

    @property
    def is_suspect(self) -> bool:
        """Claims that it may be what takes engines down."""
        return self._num_losses > 1 and not self.is_ended

    @property
    def held_runs(self) -> list[Run]:
        """What of it a runtime makes wait for an engine."""
        return [run for run in self._runs if run.is_held]

    @property
    def num_kept_bytes(self) -> int:
        """About what a resumption needs of it."""
        num_tokens = len(self.start.token_ids.ids) + self.num_tokens
        return KEPT_GENERATION_BYTES + self.start.ByteSize() + _KEPT_TOKEN_BYTES * num_tokens

    @property
    def elapsed_s(self) -> float:
        """Since the start command."""
        return time.monotonic() - self.started_s

    # What its runs say.

    def run_started(self, run: Run, started: pb.GenerationStarted) -> None:
        """It runs; the client hears of it once."""
        if self.started is None:
            self.started = started
            started.generation_id = self.generation_id
            self._tell(started=started)

    def run_gained(self, run: Run, event: pb.Event) -> None:
        """Passes new tokens on; the event is the client's from here on."""
        chunk = event.tokens
        chunk.sample_index += run.first_sample
        sample = self.samples[chunk.sample_index]
        num_tokens = len(chunk.token_ids)
        if chunk.prompt_logprobs:
            # A run that starts again sends again what the client has.
            num_known = max(self._num_prompt_logprobs - run.num_prompt_logprobs, 0)
            run.num_prompt_logprobs += len(chunk.prompt_logprobs)
            del chunk.prompt_logprobs[:num_known]
            self._num_prompt_logprobs += len(chunk.prompt_logprobs)
        if num_tokens:
            if self._num_losses:
                self._num_losses = 0
                self._placer.recovered(self)
            sample.token_ids.extend(chunk.token_ids)
            if self._credit_left is not None:
                self._credit_left -= num_tokens
            if not self.first_token_s:
                self.first_token_s = time.monotonic()
                self._placer.first_token(self.first_token_s - self.started_s)
        self.num_unread_tokens += num_tokens + len(chunk.prompt_logprobs)
        last = sample.last_unread
        if last is None or not join_chunks(last.tokens, chunk):
            event.request_id = self.request_id
            self._unread.append(event)
            sample.last_unread = event
        self._on_news(self)

    def run_finished(self, run: Run, finished: pb.GenerationFinished) -> None:
        """Takes the ends of its samples."""
        for finish in finished.samples:
            finish.sample_index += run.first_sample
            self.samples[finish.sample_index].finish = finish
        usage = self._usage
        usage.prompt_tokens = finished.usage.prompt_tokens
        usage.cached_prompt_tokens = max(
            usage.cached_prompt_tokens, finished.usage.cached_prompt_tokens
        )
        if run.is_first and not self._queued_s:
            self._queued_s = run.placed_s - self.started_s
            self._queued_s += finished.timings.queued.ToNanoseconds() / 1e9
        self._run_ended(run)
        if run.credit_left:
            self._share_credit(run.credit_left)
        self._finish_if_done()

    def run_lost(self, run: Run, error: MillraceError) -> None:
        """Goes on elsewhere, with every sample that had not ended."""
        self._run_ended(run)
        if self._is_cancelled:
            self._finish_if_done()
            return
        self._num_losses += 1
        if self._num_losses >= MAX_LOSSES:
            problem = f"{self._num_losses} times in a row, and at last: {error}"
            self.fail(EngineLost(problem=problem.rstrip(".")))
            return
        self._replace(run)

    def run_moved(self, run: Run) -> None:
        """Goes on elsewhere: its runtime gives it up, and is well."""
        self._run_ended(run)
        if self._is_cancelled:
            self._finish_if_done()
        else:
            self._replace(run)

    def start_of(self, run: Run) -> pb.StartGeneration:
        """What a runtime is told to start."""
        start = pb.StartGeneration()
        start.CopyFrom(self.start)
        start.ClearField("timeout")
        start.ClearField("credit_tokens")  # who resumes says anew what it takes
        if run.credit is not None:
            start.credit_tokens = min(run.credit, MAX_CREDIT)
        stop = start.stop
        if stop.max_new_tokens:  # an update may have lowered it, which a start may not ask for
            stop.min_new_tokens = min(stop.min_new_tokens, stop.max_new_tokens)
        if self.started is not None:
            # Only the engine that drew the tokens before draws those that come after.
            start.model = self.started.engine
        sample = self.samples[run.first_sample]
        if len(self.samples) > 1 and run.num_samples == 1:
            start.sampling.n = 1
            start.sample_index = run.first_sample
        if run.num_samples == 1:
            start.resumed_token_ids.extend(sample.token_ids)
        if not run.is_first:
            # They came before the first token.
            start.sampling.prompt_logprobs = False
        return start

    # What the reader takes.

    def take_events(self) -> Iterator[pb.Event]:
        """Everything that happened since the last time, oldest first; may be taken slowly."""
        events, self._unread = self._unread, []
        self.num_unread_tokens = 0
        for sample in self.samples:
            sample.last_unread = None
        yield from events

    def _add_run(self, run: Run) -> None:
        self._runs.append(run)
        self._placer.place(run)

    def _replace(self, run: Run) -> None:
        """Starts again what of `run` has not ended; samples that have tokens go on one by one."""
        samples = range(run.first_sample, run.first_sample + run.num_samples)
        if any(self.samples[index].token_ids or self.samples[index].finish for index in samples):
            self._split((i for i in samples if self.samples[i].finish is None), run)
        else:
            self._add_run(Run(self, run.first_sample, run.num_samples, run.credit_left, run))

    def _split(self, indices: Iterable[int], before: Run | None = None) -> None:
        """Has each of these samples run by itself, in place of the run `before`."""
        runs = [Run(self, index, 1, None, before) for index in indices]
        if self._credit_left is not None:
            credit = self._credit_left - sum(run.credit_left or 0 for run in self._runs)
            for place, run in enumerate(runs):
                run.credit = _share(max(credit, 0), len(runs), place)
        for run in runs:
            if not self.is_ended:
                self._add_run(run)

    def _share_credit(self, tokens: int) -> None:
        for place, run in enumerate(self._runs):
            run.add_credit(_share(tokens, len(self._runs), place))

    def _run_ended(self, run: Run) -> None:
        if run in self._runs:
            self._runs.remove(run)

    def _finish_if_done(self) -> None:
        if self._runs or self.is_ended:
            return
        for index, sample in enumerate(self.samples):
            if sample.finish is None:
                assert self._is_cancelled, f"sample {index} has ended without a finish"
                sample.finish = pb.SampleFinish(
                    sample_index=index, reason=pb.FINISH_REASON_CANCELLED
                )
        self._tell(finished=self._finished())
        self._end("cancelled" if self._is_cancelled else "finished")

    def _finished(self) -> pb.GenerationFinished:
        usage = self._usage
        if self.started is not None:
            usage.prompt_tokens = self.started.prompt_tokens
        usage.generated_tokens = self.num_tokens
        finished = pb.GenerationFinished(
            samples=[s.finish for s in self.samples if s.finish is not None], usage=usage
        )
        timings = finished.timings
        timings.queued.FromNanoseconds(round(self._queued_s * 1e9))
        timings.total.FromNanoseconds(round(self.elapsed_s * 1e9))
        if self.first_token_s:
            first_s = self.first_token_s - self.started_s
            timings.time_to_first_token.FromNanoseconds(round(first_s * 1e9))
        return finished

    def _tell(self, **happened: object) -> None:
        self._unread.append(pb.Event(request_id=self.request_id, **happened))  # type: ignore[arg-type]
        for sample in self.samples:
            sample.last_unread = None
        self._on_news(self)

    def _end(self, reason: str) -> None:
        self.is_ended = True
        if self.deadline is not None:
            self.deadline.cancel()
        runs, self._runs = self._runs, []
        for run in runs:
            run.forget()
        num_used = self.num_used(len(sample.token_ids) for sample in self.samples)
        self.quota.close(num_used - self._num_counted)
        self._placer.ended(self, reason)
        self._on_end(self)


def _share(tokens: int, num_shares: int, place: int) -> int:
    """One of `num_shares` parts of `tokens`, as equal as whole numbers can be."""
    return tokens // num_shares + (place < tokens % num_shares)
