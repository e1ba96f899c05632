"""What a trace tells of a generation on a runtime: its span, and the phases that it went through.

Attributes are those of OpenTelemetry's semantic conventions for generative AI, where they fit.
Nothing is told before the end: a generation keeps these moments anyhow.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from millrace.runtime.v1 import runtime_pb2 as pb

from shared.tracing import NO_SPAN, Span, Value, start_span

# Of OpenTelemetry's.
_MAX_INTEGER = 1 << 63


@dataclass(frozen=True, slots=True)
class Phases:
    """Moments of a generation, in seconds of the monotonic clock; 0 where one did not come."""

    started_s: float
    submitted_s: float
    first_step_s: float
    first_token_s: float
    last_token_s: float
    ended_s: float


class GenerationTrace:
    """The running span of a generation; `end` it once."""

    def __init__(self, span: Span, start: pb.StartGeneration, model: str) -> None:
        self.span = span
        self._attributes = {"gen_ai.response.model": model, **_asked(start, model)}

    def end(
        self, phases: Phases, usage: pb.Usage, finish_reasons: Sequence[str], error: str
    ) -> None:
        """Tells its phases (tokenize, queue, prefill, decode), its usage, and why it failed."""
        moments = (
            ("tokenize", phases.started_s, phases.submitted_s),
            ("queue", phases.submitted_s, phases.first_step_s),
            ("prefill", phases.first_step_s, phases.first_token_s),
            ("decode", phases.first_token_s, phases.last_token_s),
        )
        for name, begin_s, end_s in moments:
            # One that did not end by itself ended with the generation.
            self.span.child(name, begin_s, end_s or phases.ended_s)
            if not end_s:
                break
        attributes: dict[str, Value] = {
            **self._attributes,
            "gen_ai.response.finish_reasons": list(finish_reasons),
            "gen_ai.usage.input_tokens": usage.prompt_tokens,
            "gen_ai.usage.output_tokens": usage.generated_tokens,
            "gen_ai.usage.cache_read.input_tokens": usage.cached_prompt_tokens,
        }
        if phases.first_token_s:
            first_s = phases.first_token_s - phases.started_s
            attributes["gen_ai.response.time_to_first_chunk"] = first_s
        self.span.end(error, attributes)


def trace_generation(start: pb.StartGeneration, model: str) -> GenerationTrace | None:
    """The trace of a generation of `model` that begins now; None where nothing is traced."""
    name = f"{_operation(start)} {start.model or model}".rstrip()
    span = start_span(name, parent=start.traceparent)
    return None if span is NO_SPAN else GenerationTrace(span, start, model)


def _asked(start: pb.StartGeneration, model: str) -> dict[str, "Value"]:
    """What was asked for; neither prompt nor tenant."""
    sampling = start.sampling
    asked: dict[str, Value] = {
        "gen_ai.operation.name": _operation(start),
        "gen_ai.provider.name": "millrace",
        "gen_ai.request.model": start.model or model,
        "gen_ai.request.stream": True,
    }
    if start.stop.max_new_tokens:
        asked["gen_ai.request.max_tokens"] = start.stop.max_new_tokens
    if sampling.HasField("seed") and sampling.seed < _MAX_INTEGER:
        asked["gen_ai.request.seed"] = sampling.seed
    if sampling.temperature:
        asked["gen_ai.request.temperature"] = sampling.temperature
    if sampling.n > 1:
        asked["gen_ai.request.choice.count"] = sampling.n
    return asked


def _operation(start: pb.StartGeneration) -> str:
    return "chat" if start.WhichOneof("prompt") == "chat" else "text_completion"
