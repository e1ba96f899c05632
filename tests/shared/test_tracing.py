"""Traces: off by default, W3C context in and out, spans with the right parents."""

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import structlog
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from shared.settings import SettingsError
from shared.tracing import (
    NO_SPAN,
    Tracer,
    call_span,
    configure_tracing,
    current_traceparent,
    set_tracer,
    start_span,
    trace_metadata,
)

TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE_ID}-{SPAN_ID}-01"


@pytest.fixture
def exported() -> Iterator[InMemorySpanExporter]:
    """What is exported, with traces on."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    set_tracer(Tracer(provider))
    yield exporter
    set_tracer(None)
    structlog.contextvars.clear_contextvars()


def test_nothing_is_traced_unless_asked_and_nothing_is_imported() -> None:
    code = (
        "import sys; from shared.tracing import *; configure_tracing('runtime'); "
        "span = start_span('x'); assert span is NO_SPAN and span.traceparent == ''; "
        "assert trace_metadata() == () and not any(m.startswith('opentelemetry') for m in "
        "sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env={}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_call_goes_on_with_the_trace_that_it_came_with(exported: InMemorySpanExporter) -> None:
    with call_span("Service/Do", [("other", "x"), ("traceparent", PARENT)], {"a": 1}):
        assert structlog.contextvars.get_contextvars()["trace_id"] == TRACE_ID
        assert trace_metadata() == (("traceparent", current_traceparent()),)
        inner = start_span("inner")
        inner.child("part", 1.0, 2.5, {"b": "c"})
        inner.end(attributes={"d": True})
    part, inner_span, call = exported.get_finished_spans()
    assert (call.name, call.parent.span_id) == ("Service/Do", int(SPAN_ID, 16))
    assert {s.context.trace_id for s in (part, inner_span, call)} == {int(TRACE_ID, 16)}
    assert inner_span.parent.span_id == call.context.span_id
    assert part.parent.span_id == inner_span.context.span_id
    assert part.end_time - part.start_time == 1_500_000_000
    assert (dict(call.attributes), dict(inner_span.attributes)) == ({"a": 1}, {"d": True})
    assert current_traceparent() == ""


@pytest.mark.parametrize("sent", ["", "garbage", f"01-{TRACE_ID}-{SPAN_ID}-01", PARENT + "-x"])
def test_a_malformed_context_begins_a_trace_of_its_own(
    sent: str, exported: InMemorySpanExporter
) -> None:
    with call_span("Service/Do", [("traceparent", sent)], {}):
        pass
    (call,) = exported.get_finished_spans()
    assert call.parent is None
    assert call.context.trace_id != int(TRACE_ID, 16)


def test_what_was_not_sampled_is_not_told_but_passed_on(exported: InMemorySpanExporter) -> None:
    with call_span("Service/Do", [("traceparent", PARENT[:-2] + "00")], {}):
        assert current_traceparent().startswith(f"00-{TRACE_ID}-")
        assert current_traceparent().endswith("-00")
    assert exported.get_finished_spans() == ()


def test_a_failure_is_told_by_its_reason(exported: InMemorySpanExporter) -> None:
    start_span("x").end("QUEUE_FULL")
    (span,) = exported.get_finished_spans()
    assert (span.status.status_code, span.attributes["error.type"]) == (
        StatusCode.ERROR, "QUEUE_FULL",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "otlp, console and none are known"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"},
         "http/protobuf and grpc are known"),
    ],
)  # fmt: skip
def test_an_exporter_that_is_unknown_is_an_error(
    variables: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=says):
        configure_tracing("runtime")


@pytest.mark.parametrize(
    "variables",
    [
        {"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"},
        {"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"},
    ],
)
def test_the_standard_ways_of_turning_it_off_do(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    configure_tracing("runtime")
    assert start_span("x") is NO_SPAN


def test_moments_go_by_the_clock_as_it_is_set_now() -> None:
    """A daemon may begin before its machine has asked anybody for the time."""
    exporter, provider, set_forward_ns = InMemorySpanExporter(), TracerProvider(), [0]
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = Tracer(provider, lambda: time.time_ns() + set_forward_ns[0])
    set_forward_ns[0] = 3_600_000_000_000
    now_s = time.monotonic()
    tracer.start("whole", "internal", "", None).child("part", now_s - 2.0, now_s)
    (part,) = exporter.get_finished_spans()
    assert abs(part.end_time - time.time_ns() - set_forward_ns[0]) < 60_000_000_000
    assert abs(part.end_time - part.start_time - 2_000_000_000) < 100


def test_moments_are_the_clocks_however_long_a_look_at_it_took() -> None:
    """On a machine with much to do: phases that follow each other would overlap by as long."""
    delays_s = [0.0, 0.02, 0.0]

    def late_ns() -> int:
        now_ns = time.time_ns()
        time.sleep(delays_s.pop(0) if delays_s else 0.0)
        return now_ns

    tracer = Tracer(TracerProvider(), late_ns)
    assert abs(tracer.epoch_ns() - tracer.epoch_ns()) < 5_000_000
    assert delays_s == []
