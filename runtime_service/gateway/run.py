"""A generation, or one sample of it, on one runtime, from where it is placed to where it ends.

Of its generation it knows what `RunOwner` says.
"""

import time
from typing import Protocol

from millrace.runtime.v1 import runtime_pb2 as pb

from runtime_service.gateway.runtime_link import RuntimeLink
from runtime_service.validation import MAX_CREDIT, num_prompt_tokens_of
from shared.errors import (
    Draining,
    EngineLost,
    MillraceError,
    ModelNotServed,
    NoEngine,
    QueueFull,
    from_status,
)
from shared.tracing import NO_SPAN, Span, start_span


class RunOwner(Protocol):
    """What runs: a generation, as its runs and their placer know it.

    `start` is what its client asked for, `started` what the client was told, `cache_salt` whose it is.
    """

    start: pb.StartGeneration
    started: pb.GenerationStarted | None
    cache_salt: str
    span: Span

    @property
    def has_tokens(self) -> bool:
        """Claims that a token of it was drawn."""

    @property
    def is_suspect(self) -> bool:
        """Claims that it may be what takes engines down."""

    def start_of(self, run: "Run") -> pb.StartGeneration:
        """What a runtime is told to start."""

    def run_started(self, run: "Run", started: pb.GenerationStarted) -> None:
        """It runs."""

    def run_gained(self, run: "Run", event: pb.Event) -> None:
        """It has new tokens; the event is the owner's from here on."""

    def run_finished(self, run: "Run", finished: pb.GenerationFinished) -> None:
        """All of its samples have ended."""

    def run_lost(self, run: "Run", error: MillraceError) -> None:
        """Its runtime is lost."""

    def run_moved(self, run: "Run") -> None:
        """Its runtime gives it up, and is well."""

    def fail(self, error: MillraceError) -> None:
        """It cannot go on anywhere."""


class Run:
    """`num_samples` samples of `generation` from `first_sample` on, together on one runtime.

    Args:
        credit: tokens that it may draw; None: no limit.
        before: the one in whose place it comes: it knows who refused.
    """

    def __init__(
        self,
        generation: RunOwner,
        first_sample: int,
        num_samples: int,
        credit: int | None,
        before: "Run | None" = None,
    ) -> None:
        self.generation = generation
        self.first_sample, self.num_samples = first_sample, num_samples
        self.credit = credit
        # Claims that no token of the generation was drawn before it.
        self.is_first = not generation.has_tokens
        self.num_waiting_tokens = num_prompt_tokens_of(generation.start)
        self.num_prompt_logprobs = 0
        self.placed_s = 0.0
        # Runtimes that have refused it, why the last one did, and when it gives up waiting.
        self.avoids: set[str] = before.avoids if before else set()
        self.refusal: MillraceError | None = before.refusal if before else None
        self.gives_up_s: float = before.gives_up_s if before else 0.0
        self.is_started = self._is_over = False
        # As far as the gateway knows: in its runtime's queue, and sent to be counted apart, for want of credit.
        self._is_queued = self._is_without_credit = False
        self._span = NO_SPAN
        self._link: RuntimeLink | None = None
        self._name = ""
        self._num_tokens = 0

    @property
    def is_over(self) -> bool:
        """Claims that nothing more comes of it."""
        return self._is_over

    def over(self, error: str = "") -> None:
        """Nothing more comes of it; `error` is the reason why it failed."""
        if not self._is_over:
            self._is_over = True
            self._span.end(error, {"gen_ai.usage.output_tokens": self._num_tokens})

    @property
    def is_held(self) -> bool:
        """Claims that its runtime makes it wait for an engine."""
        link = self._link
        return link is not None and link.is_loading and not (self.is_started or self._is_over)

    @property
    def tenant(self) -> str:
        """Whose it is."""
        return self.generation.cache_salt

    @property
    def credit_left(self) -> int | None:
        """Tokens that it may still draw."""
        return None if self.credit is None else max(self.credit - self._num_tokens, 0)

    @property
    def waits_apart(self) -> bool:
        """As `validation.waits_apart`, of what a runtime is told to start; what has run goes before what is new."""
        is_moved = self.generation.started is not None
        return is_moved or self.credit_left == 0 or bool(self.generation.start.resumed_token_ids)

    def place(self, link: RuntimeLink) -> None:
        """Runs on `link` from now on.

        Raises:
            InvalidField: it is too large to get there.
        """
        self.placed_s = time.monotonic()
        self._span = start_span(
            f"run {self.generation.start.model}".rstrip(),
            kind="client",
            parent=self.generation.span.traceparent,
            attributes={"server.address": link.address},
        )
        start = self.generation.start_of(self)
        if self._span.traceparent:
            start.traceparent = self._span.traceparent
        self._name = link.submit(self, start)
        self._link, self._is_without_credit = link, self.credit == 0
        if not self._is_without_credit:
            self._join_queue()

    # What its generation says.

    def cancel(self) -> bool:
        """Has the runtime end it and say so; false where no runtime has it."""
        if self._link is None:
            self.over()
            return False
        self._send(cancel=pb.CancelGeneration(request_id=self._name))
        return True

    def forget(self) -> None:
        """Ends it; nothing more is wanted of it."""
        self.over()
        if self._link is not None:
            self._left_queue()
            self._link.forget(self._name)

    def withdraw(self) -> None:
        """Goes elsewhere: its runtime holds it back, and has not begun it."""
        self.refusal = NoEngine(wanted=self.generation.start.model or "any model")
        self.forget()
        self.generation.run_moved(self)

    def update(self, update: pb.UpdateGeneration) -> None:
        """Passes an update on; a run that is still to be placed takes it along."""
        if self._link is not None:
            mine = pb.UpdateGeneration()
            mine.CopyFrom(update)
            mine.request_id = self._name
            self._send(update=mine)

    def add_credit(self, tokens: int) -> None:
        """Lets it draw so many tokens more."""
        if self.credit is None or not tokens:
            return
        is_first = self.credit == 0
        self.credit += tokens
        if self._link is not None:
            if is_first:
                self._join_queue()
            # More than a message can say is more than any generation draws.
            most = min(tokens, MAX_CREDIT)
            self._send(credit=pb.AddCredit(request_id=self._name, tokens=most))

    # What its runtime says.

    def on_event(self, event: pb.Event) -> None:
        """Takes an event of it."""
        kind = event.WhichOneof("event")
        if kind == "tokens":
            self._left_queue()
            self._num_tokens += len(event.tokens.token_ids)
            self.generation.run_gained(self, event)
        elif kind == "started":
            # Who refused it before, and how long it waited, is over with.
            self.is_started = True
            self.avoids, self.refusal, self.gives_up_s = set(), None, 0.0
            self.generation.run_started(self, event.started)
        elif kind == "finished":
            self._left_queue()
            self.over()
            self.generation.run_finished(self, event.finished)
        else:
            self._on_error(from_status(event.error))

    def on_lost(self, error: MillraceError) -> None:
        """The runtime is gone."""
        self._lose(error)

    def _on_error(self, error: MillraceError) -> None:
        if isinstance(error, EngineLost):
            self._lose(error)
        elif isinstance(error, Draining | NoEngine | ModelNotServed | QueueFull):
            if isinstance(error, ModelNotServed):  # here: what all know is the gateway's to say
                error = NoEngine(wanted=self.generation.start.model)
            self._leave(error)
            self.generation.run_moved(self)
        else:
            self._left_queue()
            self.over(error.reason)
            self.generation.fail(error)

    def _lose(self, error: MillraceError) -> None:
        self._leave(error)
        if self.is_started:
            self.generation.run_lost(self, error)
        else:  # it never came to run there, and did no harm
            self.generation.run_moved(self)

    def _leave(self, error: MillraceError) -> None:
        """Gives its runtime up, which it will not try again soon."""
        assert self._link is not None, "a run that was not placed has no runtime to leave"
        self.over(error.reason)
        self.refusal = error
        self.avoids.add(self._link.address)
        if isinstance(error, QueueFull):
            self._left_queue()
            # Runtimes count those without credit apart: that those are too many says nothing of others.
            if not self._is_without_credit:
                self._link.says_full(self.tenant, error)
        else:
            self._is_queued = False
            self._link.turn_away(error)

    def _join_queue(self) -> None:
        assert self._link is not None, "a run that was not placed is in no queue"
        self._is_queued = True
        self._link.queue_grew(self.num_waiting_tokens)

    def _left_queue(self) -> None:
        """Its runtime's queue has room again for as much, unless that is known already."""
        if self._is_queued:
            assert self._link is not None, "a run that was not placed is in no queue"
            self._is_queued = False
            if self.is_started:
                self._link.left_queue(self.num_waiting_tokens)
            else:  # it was refused, or is given up: that says nothing of how fast the queue drains
                self._link.queue_grew(-self.num_waiting_tokens)

    def _send(self, **command: object) -> None:
        assert self._link is not None, "commands are for a run that was placed"
        self._link.send(self, pb.GenerateRequest(**command))  # type: ignore[arg-type]
