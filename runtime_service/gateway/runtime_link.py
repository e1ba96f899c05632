"""The gateway's side of one runtime: what it says of itself, and a call for each tenant.

Generations of any number of a tenant's clients share one Generate call, whose end is no other
tenant's. A runtime that is silent for too long counts as lost, and its calls are broken off: what
ran there ends there, and goes on elsewhere. Knows runs by name, and neither clients nor where runs
go next.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import grpc
import structlog
from millrace.runtime.v1 import runtime_pb2 as pb
from millrace.runtime.v1 import runtime_pb2_grpc

from runtime_service import validation
from runtime_service.gateway.routing import RUNNING_TOKENS, Candidate
from runtime_service.line_outside import LineOutside
from shared.auth import TENANT_METADATA
from shared.background import Background
from shared.channels import PeerSecurity, error_of
from shared.errors import (
    Draining,
    EngineLost,
    InvalidField,
    MillraceError,
    PermissionDenied,
    QueueFull,
    Unauthenticated,
)
from shared.settings import SettingsError

# What the gateway's own key, if any, has a runtime answer.
KEY_REFUSALS = (PermissionDenied, Unauthenticated)

# Beyond so many calls, those on which nothing runs end when another tenant comes: where callers are
# asked for no key, they may name any number of tenants.
MAX_IDLE_CALLS = 64

_LEAST_SILENT_S = 0.5
# What a start's message has beside it.
_ENVELOPE_BYTES = 64
_RATE_SMOOTHING = 0.3

_log = structlog.get_logger()

_GenerateCall = grpc.aio.StreamStreamCall[pb.GenerateRequest, pb.GenerateResponse]


class UpstreamRun(Protocol):
    """What runs on a link: a generation, or one sample of it. `tenant` is whose it is."""

    num_waiting_tokens: int

    @property
    def waits_apart(self) -> bool:
        """Claims that a full queue may have room for it."""

    @property
    def tenant(self) -> str: ...

    def on_event(self, event: pb.Event) -> None:
        """Takes an event of it; may be changed and kept."""

    def on_lost(self, error: MillraceError) -> None:
        """The runtime is gone, with all that ran there."""


@dataclass(frozen=True, slots=True)
class LinkOptions:
    """How runtimes are dealt with.

    Args:
        poll_s: between looks at one.
        silent_s: after which it is lost.
        max_message_bytes: that runtimes take.
        peers: how they know the gateway; its key must have the scope `delegate`.
    """

    poll_s: float
    silent_s: float
    max_message_bytes: int
    peers: PeerSecurity = field(default_factory=PeerSecurity)


class _TenantCall:
    """One Generate call, for one tenant: a runtime salts its prefix cache by who calls."""

    def __init__(self, tenant: str, call: _GenerateCall) -> None:
        self.tenant, self.call = tenant, call
        self.outbox: deque[pb.GenerateRequest] = deque()
        self.has_outbox = asyncio.Event()


class RuntimeLink:
    """One runtime; `start` begins to look at it.

    Args:
        on_change: called when it may have become usable, or not.
        is_fixed: was named in the settings: it is never forgotten.
    Raises:
        SettingsError: calling it would give the gateway's key away.
    """

    def __init__(
        self,
        address: str,
        options: LinkOptions,
        on_change: Callable[[], None],
        *,
        is_fixed: bool = False,
    ) -> None:
        self.address = address
        self.is_fixed = is_fixed
        self.status = pb.GetStatusResponse()
        self.tokens_per_s = 0.0
        self._max_start_bytes = options.max_message_bytes - _ENVELOPE_BYTES
        self._poll_s, self._silent_s = options.poll_s, options.silent_s
        self._on_change = on_change
        self._options = options
        self._open_channel()
        self._runs: dict[str, UpstreamRun] = {}
        self._num_runs = 0
        # Tokens of prompts that were sent after the last status, which does not know them.
        self._sent_tokens = 0
        # What it last said of its full queue, by tenant; how much waits there, and must leave it before it takes more
        # of all.
        self._full: dict[str, QueueFull] = {}
        self._queue_tokens = self._excess_tokens = 0
        self._line = LineOutside()
        self._calls: dict[str, _TenantCall] = {}
        self._background = Background()
        self._answers = self._is_draining = self._is_refused = False
        self._last_status_s = time.monotonic()
        self._last_sign_s = time.monotonic()

    def start(self) -> None:
        """Looks at the runtime from now on, until `close`."""
        self._background.keep("watch_runtime", self._watch)

    async def close(self) -> None:
        """Breaks its calls off and forgets the runtime; what runs there is lost."""
        self._break_off(list(self._calls.values()), EngineLost(problem="the gateway left it"))
        await self._background.close()
        await self._channel.close()

    @property
    def is_usable(self) -> bool:
        """Claims that it takes generations now."""
        return self._answers and self.status.state == pb.RUNTIME_STATE_SERVING

    @property
    def is_loading(self) -> bool:
        """Claims that what it was sent and has not begun waits until it has loaded an engine."""
        return self._answers and self.status.state == pb.RUNTIME_STATE_LOADING

    @property
    def state(self) -> pb.RuntimeState.ValueType:
        """Where it stands; unspecified while it does not answer."""
        if self._is_draining:
            return pb.RUNTIME_STATE_DRAINING
        return self.status.state if self._answers else pb.RUNTIME_STATE_UNSPECIFIED

    @property
    def answers(self) -> bool:
        """Claims that it answered when it was last looked at."""
        return self._answers or self._is_draining

    @property
    def silent_s(self) -> float:
        """Since its last sign of life."""
        return time.monotonic() - self._last_sign_s

    @property
    def num_runs(self) -> int:
        """What runs there for this gateway."""
        return len(self._runs)

    def serves(self, model: str) -> bool:
        """Claims that it serves, or is to serve, what `model` of a start names; where that names none, anything."""
        if not model:
            return self.status.state != pb.RUNTIME_STATE_IDLE or bool(self.status.deployment)
        engine = self.status.engine
        names = (self.status.deployment, engine.model, engine.name, engine.key.model_digest)
        return model in names

    def is_full(self, tenant: str) -> bool:
        """Claims that its queue has no room for this tenant, as far as is known: a start need not be sent to hear so.

        For a tenant with less than its share it has room where it has none for others: it says so itself, to each. It
        has room once as much has left it as was too much in it. What others sent leaves it
        unseen, so after each look at it the next start is sent.
        """
        return tenant in self._full and self._excess_tokens >= 0

    def has_room_for(self, run: UpstreamRun) -> bool:
        """Claims that it may take `run`."""
        return not self.is_full(run.tenant) or run.waits_apart

    def fits(self, start: pb.StartGeneration) -> bool:
        """Claims that its prompt may run there, as far as is known."""
        longest = self.status.limits.max_sequence_tokens
        return not longest or not validation.is_too_long(start, longest)

    def room_in_s(self, tenant: str, num_tokens: int) -> float:
        """When a start of so many tokens that it has no room for may find some."""
        return self._line.delay_s(tenant, num_tokens, self._queue_tokens)

    def says_full(self, tenant: str, error: QueueFull) -> None:
        """It has refused a start of this tenant."""
        waiting, most = (
            int(error.fields.get(name, 0)) for name in ("waiting_tokens", "max_waiting_tokens")
        )
        self._full[tenant] = error
        self._queue_tokens, self._excess_tokens = waiting, max(waiting - most, 0)

    def queue_grew(self, num_tokens: int) -> None:
        """So many tokens more wait there than was known; negative: they never came to wait."""
        self._excess_tokens += num_tokens

    def left_queue(self, num_tokens: int) -> None:
        """A run of so many tokens waits there no more: it has a token, or has ended."""
        self._excess_tokens -= num_tokens
        self._line.left_queue(num_tokens)

    def turn_down(self, tenant: str, num_tokens: int) -> QueueFull:
        """What a start of so many tokens is told while it is full; many in a row are told the same object."""
        assert tenant in self._full, "a runtime that has room turns nobody down"
        told = self._full[tenant]
        retry_after_s = self._line.join(tenant, num_tokens, self._queue_tokens)
        if retry_after_s != told.retry_after_s:
            told = self._full[tenant] = QueueFull(retry_after_s=retry_after_s, **told.fields)
        return told

    def candidate(self) -> Candidate:
        """As routing sees it."""
        load = self.status.load
        running = max(load.running_sequences, len(self._runs))
        tokens = load.waiting_tokens + self._sent_tokens + RUNNING_TOKENS * running
        return Candidate(self.address, tokens)

    def submit(self, run: UpstreamRun, start: pb.StartGeneration) -> str:
        """Has the runtime start `run`; gives the name that its commands need.

        Raises:
            InvalidField: it is larger than the runtime takes, which would break the call of all.
        """
        size, limit = start.ByteSize(), self._max_start_bytes
        if size > limit:
            problem = f"has {size} bytes, and may have {limit} on its way to a runtime"
            raise InvalidField(field="start", problem=problem)
        self._num_runs += 1
        name = start.request_id = str(self._num_runs)
        self._runs[name] = run
        self._sent_tokens += run.num_waiting_tokens
        if run.tenant not in self._calls:
            self._open_call(run.tenant)
        self.send(run, pb.GenerateRequest(start=start))
        return name

    def send(self, run: UpstreamRun, command: pb.GenerateRequest) -> None:
        """Passes on a command for `run`; means nothing when its call is lost."""
        call = self._calls.get(run.tenant)
        if call is not None:
            call.outbox.append(command)
            call.has_outbox.set()

    def forget(self, name: str) -> None:
        """Ends a run of which nothing more is wanted; a no-op on one that has ended."""
        run = self._runs.pop(name, None)
        if run is not None:
            self.send(run, pb.GenerateRequest(cancel=pb.CancelGeneration(request_id=name)))

    def turn_away(self, error: MillraceError) -> None:
        """A generation learned before the next look that it takes nothing now."""
        if isinstance(error, Draining):
            self._is_draining = True
        if self._answers:
            self._answers = False
            self._on_change()

    # Its calls.

    def _open_call(self, tenant: str) -> None:
        if len(self._calls) >= MAX_IDLE_CALLS:
            self._end_idle_calls()
        metadata = ((TENANT_METADATA, tenant.encode()),) if tenant else ()
        opened = self._calls[tenant] = _TenantCall(tenant, self._stub.Generate(metadata=metadata))
        self._background.run("read_runtime", self._read(opened))
        self._background.run("write_runtime", self._write(opened), on_failure=opened.call.cancel)

    def _end_idle_calls(self) -> None:
        busy = {run.tenant for run in self._runs.values()}
        for tenant in self._calls.keys() - busy:
            self._end_call(self._calls[tenant])

    def _end_call(self, opened: _TenantCall) -> None:
        del self._calls[opened.tenant]
        opened.call.cancel()
        opened.has_outbox.set()

    def _is_open(self, opened: _TenantCall) -> bool:
        return self._calls.get(opened.tenant) is opened

    async def _write(self, opened: _TenantCall) -> None:
        try:
            while self._is_open(opened):
                while opened.outbox:
                    await opened.call.write(opened.outbox.popleft())
                opened.has_outbox.clear()
                await opened.has_outbox.wait()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            # The call has ended; whoever reads it says why.
            return

    async def _read(self, opened: _TenantCall) -> None:
        error: MillraceError = EngineLost(problem="it ended the call")
        try:
            async for response in opened.call:
                self._last_sign_s = time.monotonic()
                for event in response.events:
                    self._dispatch(event)
        except grpc.aio.AioRpcError as raised:
            error = error_of(raised)
        finally:  # also where an event made no sense: what runs there would wait for ever
            if self._is_open(opened):
                self._is_draining = self._is_draining or isinstance(error, Draining)
                self._break_off([opened], error)

    def _dispatch(self, event: pb.Event) -> None:
        # Late events of what was forgotten have no run.
        run = self._runs.get(event.request_id)
        if run is None:
            return
        if event.HasField("finished") or event.HasField("error"):
            del self._runs[event.request_id]
        run.on_event(event)

    def _break_off(self, calls: list[_TenantCall], error: MillraceError) -> None:
        """Ends `calls` and all that runs on them."""
        if not calls:
            return
        for opened in calls:
            self._end_call(opened)
        self._answers = False
        tenants = {opened.tenant for opened in calls}
        lost = {name: run for name, run in self._runs.items() if run.tenant in tenants}
        self._runs = {name: run for name, run in self._runs.items() if name not in lost}
        if lost:
            _log.warning(
                "runtime_lost", runtime=self.address, problem=str(error), generations=len(lost)
            )
        for run in lost.values():
            run.on_lost(error)
        self._on_change()

    def _open_channel(self) -> None:
        options = self._options
        stamp = options.peers.tls.stamp()
        self._channel = options.peers.aio_channel(
            self.address,
            [
                ("grpc.max_receive_message_length", options.max_message_bytes),
                ("grpc.max_send_message_length", options.max_message_bytes),
                ("grpc.enable_http_proxy", 0),
                # A runtime that comes back is found again quickly.
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 1_000),
            ],
        )
        self._stub: runtime_pb2_grpc.RuntimeServiceAsyncStub
        self._stub = runtime_pb2_grpc.RuntimeServiceStub(self._channel)
        # Of files that could be read: others are tried again, even where only their mode changes.
        self._tls_stamp = stamp

    async def _follow_certificates(self) -> None:
        """Reads them anew where they have changed: gRPC does so with a new channel alone."""
        try:
            if self._calls or self._options.peers.tls.stamp() == self._tls_stamp:
                return
            old = self._channel
            self._open_channel()
        except (SettingsError, OSError) as error:  # they are being exchanged this moment
            _log.warning("peer_tls_files_unusable", runtime=self.address, problem=str(error))
            return
        await old.close()

    # What it says of itself.

    async def _watch(self) -> None:
        while True:
            began_s = time.monotonic()
            await self._look()
            if self._calls and self.silent_s > self._silent_s:
                error = EngineLost(problem=f"it was silent for {self.silent_s:.1f} s")
                self._break_off(list(self._calls.values()), error)
            await asyncio.sleep(max(self._poll_s - (time.monotonic() - began_s), 0))

    async def _look(self) -> None:
        sent_tokens = self._sent_tokens
        try:
            status = await self._stub.GetStatus(
                pb.GetStatusRequest(), timeout=max(self._silent_s / 2, _LEAST_SILENT_S)
            )
        except grpc.aio.AioRpcError as raised:
            # One that drains refuses this too, and finishes what it has.
            error = error_of(raised)
            self._is_draining = isinstance(error, Draining)
            was_refused, self._is_refused = self._is_refused, isinstance(error, KEY_REFUSALS)
            if self._is_refused and not was_refused:
                _log.error("runtime_refuses_gateway", runtime=self.address, problem=str(error))
            if self._is_draining:
                self._last_sign_s = time.monotonic()
            has_changed, self._answers = self._answers, False
            if isinstance(error, EngineLost):
                await self._follow_certificates()
        else:
            has_changed = self._take(status)
            self._sent_tokens -= sent_tokens
        if has_changed:
            self._on_change()

    def _take(self, status: pb.GetStatusResponse) -> bool:
        """Takes what it says of itself; whether it matters to who waits for a runtime."""
        now_s, old = time.monotonic(), self.status
        if old.runtime_id == status.runtime_id:
            num_tokens = status.load.generated_tokens - old.load.generated_tokens
            rate = num_tokens / max(now_s - self._last_status_s, 1e-3)
            self.tokens_per_s += _RATE_SMOOTHING * (rate - self.tokens_per_s)
        else:
            self.tokens_per_s = 0.0
        self._last_sign_s = self._last_status_s = now_s
        self.status, was_answering, self._answers = status, self._answers, True
        self._full.clear()
        self._is_draining = self._is_refused = False
        return (
            not was_answering
            or old.state != status.state
            or old.engine.name != status.engine.name
            or old.deployment != status.deployment
        )
