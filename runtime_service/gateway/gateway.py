"""Where the generations of all clients go: each to a runtime that can run it, and on to another.

A generation that no runtime can take now waits for one, for as long as the settings say; one that
nobody serves or that all refuse is refused. Knows no gRPC of its own.
"""

import asyncio
import secrets
import time

import structlog
from millrace.runtime.v1 import runtime_pb2 as pb

from runtime_service import validation
from runtime_service.gateway.fleet import Fleet
from runtime_service.gateway.kept import KeptGenerations
from runtime_service.gateway.metrics import GatewayMetrics
from runtime_service.gateway.routed_generation import RoutedGeneration
from runtime_service.gateway.routing import KnownPrefixes, choose, prefix_of
from runtime_service.gateway.run import Run, RunOwner
from runtime_service.gateway.runtime_link import KEY_REFUSALS, RuntimeLink
from runtime_service.generation_call import GenerationCall, OnMember
from runtime_service.tenant_queue import TenantQueue
from runtime_service.validation import num_prompt_tokens_of
from shared.auth import ANYBODY, Principal
from shared.errors import (
    DeadlineExceeded,
    Draining,
    EngineLost,
    GatewayRefused,
    GenerationNotFound,
    InvalidField,
    MillraceError,
    NoEngine,
    QueueFull,
)
from shared.log import Tally
from shared.quotas import GenerationQuota
from shared.tracing import start_span, trace_fields

# Ids are below any vocabulary's size here; the runtime knows its own.
_ANY_VOCABULARY = 1 << 32
# Between tries of a generation that every runtime has refused, where they do not say.
_RETRY_S = 0.2
# Tokens that may wait for a runtime, as a `TenantQueue` has it, by the estimate that routing uses.
MAX_WAITING_TOKENS = 8 << 20

_log = structlog.get_logger()


class Gateway:
    """Routes generations over a fleet.

    Args:
        wait_s: how long a generation waits for a runtime that can run it.
        kept: those that can be resumed.
    """

    def __init__(
        self, fleet: Fleet, metrics: GatewayMetrics, wait_s: float, kept: KeptGenerations
    ) -> None:
        self._fleet = fleet
        fleet.on_change(self._fleet_changed)
        self._metrics = metrics
        self._wait_s = wait_s
        self._kept = kept
        self._calls: set[GenerationCall[RoutedGeneration]] = set()
        self._running: set[RoutedGeneration] = set()
        # In the order of their coming.
        self._waiting: dict[Run, asyncio.TimerHandle] = {}
        self._waiting_tokens = TenantQueue(MAX_WAITING_TOKENS)
        self._known_prefixes = KnownPrefixes()
        self._on_trial: RunOwner | None = None
        self._refused = Tally("starts_refused", reason=QueueFull.reason)
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_draining = False

    @property
    def is_serving(self) -> bool:
        """Claims that there is a runtime for somebody."""
        return any(link.is_usable for link in self._fleet)

    @property
    def keep_s(self) -> float:
        """How long after its end a generation can be resumed."""
        return self._kept.keep_s

    # Calls and starts.

    def open_call(self, caller: Principal = ANYBODY) -> GenerationCall[RoutedGeneration]:
        """A call of `caller` whose generations are routed; give it back with `close_call`."""
        call = GenerationCall(self, caller)
        self._calls.add(call)
        if self._is_draining:
            call.drain()
        return call

    def close_call(self, call: GenerationCall[RoutedGeneration]) -> None:
        """Ends what still runs on `call`: nobody reads it. It can be resumed."""
        self._calls.discard(call)
        call.close()

    def check_room(self, start: pb.StartGeneration, cache_salt: str) -> None:
        """Refuses `start` where every runtime that serves what it wants is known to be full for its tenant.

        Raises:
            QueueFull: so it is.
        """
        links = self._serving(start.model)
        is_full = links and all(link.is_full(cache_salt) for link in links)
        if not is_full or validation.waits_apart(start) or self._is_draining:
            return
        if any(link.fits(start) for link in links):
            self._count_refused()
            raise _turned_down(links, cache_salt, num_prompt_tokens_of(start))

    def new_generation(
        self, request_id: str, on_news: OnMember, on_end: OnMember, quota: GenerationQuota
    ) -> RoutedGeneration:
        """A generation that is not started yet."""
        generation = RoutedGeneration(request_id, self, on_news, on_end, quota)
        self._running.add(generation)
        self._metrics.running.inc()
        self._idle.clear()
        return generation

    def start(
        self, generation: RoutedGeneration, start: pb.StartGeneration, cache_salt: str
    ) -> None:
        """Sees to it that `generation` runs, or ends it with an error; never raises."""
        generation.span = start_span(f"route {start.model}".rstrip(), parent=start.traceparent)
        try:
            if self._is_draining:
                raise Draining()
            parsed = validation.parse_start(start, _ANY_VOCABULARY, ())
            if not start.sampling.HasField("seed"):
                # Drawn here, so that it is the same wherever the generation comes to run.
                start.sampling.seed = parsed.sampling.seed
            generation.quota.reserve(self._most_tokens(start))
        except MillraceError as error:
            generation.fail(error)
            return
        generation.begin(start, cache_salt, secrets.token_urlsafe(16))
        if not generation.is_ended:
            self._kept.add(generation)

    def share_of_resumed(
        self, resume: pb.ResumeGeneration, cache_salt: str
    ) -> GenerationQuota | None:
        """What the generation holds that a client goes on with; None where it is not kept any more."""
        try:
            return self._kept.find(resume.generation_id, cache_salt).quota
        except GenerationNotFound:
            return None  # `resume` says so

    def resume(
        self, generation: RoutedGeneration, resume: pb.ResumeGeneration, cache_salt: str
    ) -> None:
        """Has `generation` go on where the client has come to; never raises."""
        generation.span = start_span("route a resumed generation")
        try:
            if self._is_draining:
                raise Draining()
            old = self._kept.find(resume.generation_id, cache_salt)
            received = _received(resume, old)
            credit = validation.credit_of(resume, "resume.credit_tokens")
            timeout_s = validation.timeout_of(old.start)
            # What it held of its tenant's quota is what it goes on with.
            old.abandon()
            generation.quota.reserve(max(self._most_tokens(old.start) - old.num_used(received), 0))
        except MillraceError as error:
            generation.fail(error)
            return
        self._metrics.resumed.inc()
        if timeout_s is not None:
            generation.deadline = asyncio.get_running_loop().call_later(
                timeout_s - old.elapsed_s, generation.fail, DeadlineExceeded(timeout_s=timeout_s)
            )
        generation.limit_credit(credit)
        generation.continue_from(old, received)
        if not generation.is_ended:
            self._kept.add(generation)

    async def drain(self, grace_s: float) -> None:
        """Takes nothing new, lets what runs finish, and ends what is left with DRAINING."""
        self._is_draining = True
        for call in self._calls:
            call.drain()
        try:
            async with asyncio.timeout(grace_s):
                await self._idle.wait()
        except TimeoutError:
            _log.warning("drain_grace_ended", generations=len(self._running))
        for call in list(self._calls):
            call.fail_all(Draining())

    # What generations and runtimes say.

    def place(self, run: Run) -> None:
        """Starts `run` on a runtime, now or when there is one; or ends its generation."""
        if run.refusal is not None and not run.gives_up_s:
            self._metrics.moved.labels(run.refusal.reason).inc()
        if run.avoids:
            self._known_prefixes.refused(_prefix(run), run.avoids)
        link = self._choose(run) if self._may_run(run.generation) else None
        try:
            if link is None:
                self._wait(run)
                return
            if run.generation.is_suspect:
                self._on_trial = run.generation
            run.place(link)
            self._known_prefixes.sent(_prefix(run), link.address)
        except MillraceError as error:
            run.over(error.reason)
            run.generation.fail(error)
        self._waiting_tokens.take(run)

    def ended(self, generation: RoutedGeneration, reason: str) -> None:
        """Takes note of the end of a generation."""
        self._running.discard(generation)
        self._metrics.running.dec()
        is_refused = isinstance(generation.error, QueueFull) and not generation.num_tokens
        if is_refused:
            self._count_refused()
        else:
            self._metrics.ended.labels(reason).inc()
            generation.context.run(_tell_end, generation, reason)
        if reason == "cancelled":
            self._kept.forget(generation)
        elif generation.generation_id:
            self._kept.ended(generation)
        if generation is self._on_trial:
            self._on_trial = None
        if not self._running:
            self._idle.set()
        generation.span.end(
            generation.error.reason if generation.error else "",
            {"millrace.end_reason": reason, "gen_ai.usage.output_tokens": generation.num_tokens},
        )

    def recovered(self, generation: RoutedGeneration) -> None:
        """The next suspect may be tried."""
        if generation is self._on_trial:
            self._on_trial = None
            self._try_all_again()

    def first_token(self, seconds: float) -> None:
        """Takes note of how long a generation waited for its first token."""
        self._metrics.first_token_seconds.observe(seconds)

    def _count_refused(self) -> None:
        # The fuller the fleet, the more of these: a log line each would be most of their cost.
        self._metrics.ended.labels(QueueFull.reason).inc()
        self._refused.add()

    def _most_tokens(self, start: pb.StartGeneration) -> int:
        """What a generation may use at most, where engines are as long as the longest here."""
        num_prompt_tokens = num_prompt_tokens_of(start)
        longest = max((link.status.limits.max_sequence_tokens for link in self._fleet), default=0)
        num_new_tokens = start.stop.max_new_tokens
        if longest:
            room = max(longest - num_prompt_tokens, 0)
            num_new_tokens = min(num_new_tokens or room, room)
        return num_prompt_tokens + (start.sampling.n or 1) * num_new_tokens

    def _fleet_changed(self) -> None:
        """Who waits for a runtime looks again, also who waits at one that exchanges its engine."""
        usable = [link.is_usable for link in self._fleet]
        self._metrics.runtimes.labels("yes").set(sum(usable))
        self._metrics.runtimes.labels("no").set(len(usable) - sum(usable))
        self._try_all_again()
        for run in [run for generation in self._running for run in generation.held_runs]:
            if self._choose(run) is not None:
                run.withdraw()

    # Placing.

    def _choose(self, run: Run) -> RuntimeLink | None:
        able = self._able(run)
        # What fits nowhere waits nowhere: any runtime says so.
        if any(link.fits(run.generation.start) for link in able):
            able = [link for link in able if link.has_room_for(run)]
        links = {link.address: link for link in able}
        if not links:
            return None
        prefix = _prefix(run)
        candidates = [link.candidate() for link in links.values()]
        return links[choose(candidates, prefix, self._known_prefixes.address_of(prefix))]

    def _able(self, run: Run) -> list[RuntimeLink]:
        """Runtimes that serve what `run` wants, and have not refused it."""
        started = run.generation.started
        model = run.generation.start.model if started is None else started.engine
        return [link for link in self._serving(model) if link.address not in run.avoids]

    def _serving(self, model: str) -> list[RuntimeLink]:
        return [link for link in self._fleet if link.is_usable and link.serves(model)]

    def _wait(self, run: Run) -> None:
        """Has `run` wait for a runtime.

        Raises:
            ModelNotServed: others are served, and what it wants is not, nor about to be.
            NoEngine: nothing is served, or about to be; or it has waited long enough.
            QueueFull: it is new, and every runtime has more than enough to do; or too many tokens wait here.
            EngineLost: it has run before, and has waited long enough to go on.
            GatewayRefused: runtimes refuse the gateway's key, which waiting does not change.
        """
        generation, refusal, now_s = run.generation, run.refusal, time.monotonic()
        is_new = generation.started is None
        model = generation.start.model
        if is_new and (refusal is None or isinstance(refusal, QueueFull)):
            full = [link for link in self._serving(model) if not link.has_room_for(run)]
            if full:
                raise _turned_down(full, run.tenant, run.num_waiting_tokens)
            if refusal is not None:
                raise refusal
        if is_new and isinstance(refusal, KEY_REFUSALS):
            raise GatewayRefused()
        if is_new and not any(link.serves(model) for link in self._fleet):
            self._fleet.check_model(model)
            raise NoEngine(wanted=model or "any model")
        run.gives_up_s = run.gives_up_s or now_s + self._wait_s
        if now_s >= run.gives_up_s:
            if is_new:
                raise refusal or NoEngine(wanted=model or "any model")
            raise EngineLost(problem=f"no runtime can go on with it after {self._wait_s:.0f} s")
        # It keeps its room from look to look: what was taken is not thrown out for what came after it.
        if run not in self._waiting_tokens:
            self._waiting_tokens.check_room(run.num_waiting_tokens, run.tenant)
            self._waiting_tokens.add(run, run.tenant, run.num_waiting_tokens)
        delay_s = refusal.retry_after_s if isinstance(refusal, QueueFull) else None
        delay_s = min(delay_s or _RETRY_S, run.gives_up_s - now_s)
        timer = asyncio.get_running_loop().call_later(delay_s, self._try_again, run)
        self._waiting[run] = timer
        self._metrics.waiting.set(len(self._waiting))

    def _may_run(self, generation: RunOwner) -> bool:
        """Claims that it puts no others in danger beyond those that it meets by chance.

        Of those that were lost with their engines again and again only one is tried at a time: the
        others get their next token without it, and are no suspects any more.
        """
        tried = self._on_trial
        is_free = tried is None or tried is generation or not tried.is_suspect
        return is_free or not generation.is_suspect

    def _try_all_again(self) -> None:
        for run in list(self._waiting):
            self._try_again(run)

    def _try_again(self, run: Run) -> None:
        """Has `run` ask every runtime again, refusals forgotten."""
        run.avoids.clear()
        timer = self._waiting.pop(run, None)
        if timer is None:
            return
        timer.cancel()
        self._metrics.waiting.set(len(self._waiting))
        if run.is_over:
            self._waiting_tokens.take(run)
        else:
            self.place(run)


def _turned_down(links: list[RuntimeLink], tenant: str, num_tokens: int) -> QueueFull:
    """What a start of so many tokens is told that these have no room for."""
    link = links[0]
    if len(links) > 1:
        link = min(links, key=lambda link: link.room_in_s(tenant, num_tokens))
    # Many are told the same object: what raised it for others is no part of it.
    return link.turn_down(tenant, num_tokens).with_traceback(None)


def _prefix(run: Run) -> bytes:
    return prefix_of(run.generation.start, run.generation.cache_salt)


def _tell_end(generation: RoutedGeneration, reason: str) -> None:
    _log.info(
        "generation_finished",
        request_id=generation.request_id,
        reason=reason,
        num_samples=len(generation.samples),
        generated_tokens=generation.num_tokens,
        duration_s=round(generation.elapsed_s, 6),
        **trace_fields(generation.span),
    )


def _received(resume: pb.ResumeGeneration, old: RoutedGeneration) -> list[int]:
    """Tokens that the client has, one number a sample.

    Raises:
        InvalidField: more than there were.
    """
    field = "resume.received_tokens"
    received = list(resume.received_tokens)
    if len(received) > len(old.samples):
        raise InvalidField(field=field, problem=f"there are {len(old.samples)} samples")
    received += [0] * (len(old.samples) - len(received))
    for num_tokens, sample in zip(received, old.samples, strict=True):
        if not 0 <= num_tokens <= len(sample.token_ids):
            problem = f"must be from 0 to {len(sample.token_ids)}, found {num_tokens}"
            raise InvalidField(field=field, problem=problem)
    return received
