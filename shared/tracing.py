"""Traces: what one request went through, across processes, as OpenTelemetry tells it.

Off, and then nothing but a variable is looked at, unless the standard OTEL_* variables name an
exporter; `configure_tracing` reads them once, in `main`. Trace context comes and goes as W3C
`traceparent`: in the metadata of a call, or in a message where one call serves several traces.
Moments are those of `time.monotonic`, so that a span can be told when it is over.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Literal, Protocol

import structlog

from shared.settings import SettingsError, telemetry_environ

if TYPE_CHECKING:
    from opentelemetry import trace as otel
    from opentelemetry.sdk.trace import TracerProvider

TRACEPARENT = "traceparent"
_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
# Two looks at clocks that nothing comes between take a thousandth of it.
_AT_ONCE_NS = 500_000

Kind = Literal["internal", "server", "client", "consumer"]
Value = str | int | float | bool | Sequence[str]
Attributes = Mapping[str, Value]


class Span(Protocol):
    """Something that takes a while.

    Args:
        trace_id: 32 hex digits, or "" where nothing is traced.
        traceparent: makes what another process does its child; "" likewise.
    """

    @property
    def trace_id(self) -> str: ...

    @property
    def traceparent(self) -> str: ...

    def child(
        self, name: str, start_s: float, end_s: float, attributes: Attributes | None = None
    ) -> None:
        """Tells of a part of it that is over."""

    def end(self, error: str = "", attributes: Attributes | None = None) -> None:
        """Ends it, once; `error` is the reason why it failed."""


class _NoSpan:
    trace_id = traceparent = ""

    def child(
        self, name: str, start_s: float, end_s: float, attributes: Attributes | None = None
    ) -> None:
        pass

    def end(self, error: str = "", attributes: Attributes | None = None) -> None:
        pass


NO_SPAN: Span = _NoSpan()


class Tracer:
    """Starts spans that `provider` exports.

    Args:
        wall_ns: Unix time now, in nanoseconds.
    """

    def __init__(
        self, provider: "TracerProvider", wall_ns: Callable[[], int] = time.time_ns
    ) -> None:
        from opentelemetry import trace

        self.provider = provider
        self._trace = trace
        self._tracer = provider.get_tracer("millrace")
        self._wall_ns = wall_ns

    def start(
        self,
        name: str,
        kind: Kind,
        parent: str,
        attributes: Attributes | None,
        start_ns: int | None = None,
    ) -> "_RecordedSpan":
        """A running span; `parent` is a traceparent, and where it makes no sense, it has none.

        Args:
            start_ns: Unix time, in nanoseconds; None: now.
        """
        return _RecordedSpan(
            self,
            self._tracer.start_span(
                name,
                context=self._context(parent),
                kind=getattr(self._trace.SpanKind, kind.upper()),
                attributes=dict(attributes or {}),
                start_time=start_ns,
            ),
        )

    def epoch_ns(self) -> int:
        """Unix time at which `time.monotonic` was 0, in nanoseconds.

        By the clock as it is set now: it may have been set anew since this process began, and spans that begin now
        go by it. Phases that follow each other are told apart by it: between its looks at the two clocks it must not
        have stood still for want of a processor.
        """
        while True:
            monotonic_ns = time.monotonic_ns()
            wall_ns = self._wall_ns()
            if time.monotonic_ns() - monotonic_ns < _AT_ONCE_NS:
                return wall_ns - monotonic_ns

    def failed(self, reason: str) -> "otel.Status":
        """The status of a span that failed."""
        return self._trace.Status(self._trace.StatusCode.ERROR, reason)

    def _context(self, parent: str) -> Any:
        from opentelemetry.context import Context

        match = _TRACEPARENT.fullmatch(parent)
        if match is None:
            return Context()
        trace_id, span_id, flags = (int(part, 16) for part in match.groups())
        remote = self._trace.SpanContext(
            trace_id, span_id, is_remote=True, trace_flags=self._trace.TraceFlags(flags)
        )
        return self._trace.set_span_in_context(self._trace.NonRecordingSpan(remote), Context())


class _RecordedSpan:
    def __init__(self, tracer: Tracer, span: "otel.Span") -> None:
        self._tracer, self._span = tracer, span
        context = span.get_span_context()
        self.trace_id = f"{context.trace_id:032x}"
        self.traceparent = (
            f"00-{self.trace_id}-{context.span_id:016x}-{int(context.trace_flags):02x}"
        )

    def child(
        self, name: str, start_s: float, end_s: float, attributes: Attributes | None = None
    ) -> None:
        epoch_ns = self._tracer.epoch_ns()
        start_ns, end_ns = (epoch_ns + round(s * 1e9) for s in (start_s, max(end_s, start_s)))
        child = self._tracer.start(name, "internal", self.traceparent, attributes, start_ns)
        child._span.end(end_ns)

    def end(self, error: str = "", attributes: Attributes | None = None) -> None:
        self._span.set_attributes(dict(attributes or {}))
        if error:
            self._span.set_attribute("error.type", error)
            self._span.set_status(self._tracer.failed(error))
        self._span.end()


_tracer: ContextVar[Tracer | None] = ContextVar("tracer", default=None)
_current: ContextVar[Span] = ContextVar("span", default=NO_SPAN)


def configure_tracing(component: str) -> None:
    """Turns traces on for all that runs in this context from now on, if the variables ask for it.

    Raises:
        SettingsError: they ask for what is not installed, or does not exist.
    """
    environ = telemetry_environ()
    exporter = environ.get("OTEL_TRACES_EXPORTER", "")
    endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    is_asked = bool(exporter) or any(environ.get(name) for name in endpoints)
    is_disabled = environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if not is_asked or is_disabled or exporter == "none":
        return
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        exporting = BatchSpanProcessor(_exporter(exporter or "otlp", environ))
    except ImportError as error:
        raise SettingsError(
            f"the OTEL_ variables ask for traces: pip install 'millrace-server[otel]' ({error})"
        ) from None
    # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win over it.
    named = environ.get("OTEL_SERVICE_NAME") or f"millrace-{component}"
    provider = TracerProvider(resource=Resource.create({"service.name": named}))
    provider.add_span_processor(exporting)
    set_tracer(Tracer(provider))


def set_tracer(tracer: Tracer | None) -> None:
    """Has what runs in this context traced by `tracer`; for `configure_tracing`, and tests."""
    _tracer.set(tracer)


def start_span(
    name: str, *, kind: Kind = "internal", parent: str = "", attributes: Attributes | None = None
) -> Span:
    """A span that begins now.

    Args:
        parent: a traceparent; "": the span that runs in this context, if any.
    """
    tracer = _tracer.get()
    if tracer is None:
        return NO_SPAN
    return tracer.start(name, kind, parent or _current.get().traceparent, attributes)


def current_traceparent() -> str:
    """Of the span that runs in this context; "" where there is none."""
    return _current.get().traceparent


def leave_span() -> None:
    """What runs in this context is no part of a call's span from here on."""
    _current.set(NO_SPAN)


def trace_metadata() -> tuple[tuple[str, str], ...]:
    """What a call to another daemon carries, so that its work belongs to this trace."""
    traceparent = current_traceparent()
    return ((TRACEPARENT, traceparent),) if traceparent else ()


def trace_fields(span: Span) -> dict[str, str]:
    """What a log line says of `span`."""
    return {"trace_id": span.trace_id} if span.trace_id else {}


@contextmanager
def call_span(
    name: str, metadata: Iterable[tuple[str, Any]], attributes: Attributes
) -> Iterator[dict[str, str]]:
    """Traces a call that came in, while the block runs; log lines in it have its `trace_id`.

    The block says in `error` why the call failed, and its attributes in the other keys.
    """
    if _tracer.get() is None:
        yield {}
        return
    parent = next((str(value) for key, value in metadata if key == TRACEPARENT), "")
    span = start_span(name, kind="server", parent=parent, attributes=attributes)
    structlog.contextvars.bind_contextvars(**trace_fields(span))
    token = _current.set(span)
    said: dict[str, str] = {}
    try:
        yield said
    finally:
        _current.reset(token)
        span.end(said.pop("error", ""), said)


def _exporter(name: str, environ: Mapping[str, str]) -> Any:
    if name == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter()
    if name != "otlp":
        raise SettingsError(f"OTEL_TRACES_EXPORTER={name}: otlp, console and none are known")
    protocol = (
        environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
        or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
        or "http/protobuf"
    )
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc import trace_exporter as over_grpc

        return over_grpc.OTLPSpanExporter()
    if protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http import trace_exporter as over_http

        return over_http.OTLPSpanExporter()
    raise SettingsError(f"OTLP over {protocol!r}: http/protobuf and grpc are known")
