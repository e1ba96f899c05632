"""Trace context of the program that uses the SDK: its spans are the parents of what daemons do.

The SDK makes no spans and needs no OpenTelemetry: it looks whether the program has imported it.
"""

import sys


def current_traceparent() -> str:
    """W3C trace context of the running span; "" where the program traces nothing now."""
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None:
        return ""
    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return ""
    flags = int(context.trace_flags)
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{flags:02x}"
