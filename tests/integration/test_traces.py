"""One request is one trace, over real processes: client, gateway, runtime, compile daemon, worker."""

import json
from collections.abc import Iterator
from itertools import pairwise
from urllib.request import Request, urlopen

import pytest
from millrace import AsyncClient, Client, MillraceError
from millrace.channels import wait_until_answering
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import format_trace_id

from tests.checkpoints import write_checkpoint
from tests.integration.compiler_daemon import CompilerDaemon
from tests.integration.daemon_process import DaemonProcess
from tests.integration.otlp_receiver import OtlpReceiver, ReceivedSpan

pytestmark = pytest.mark.redis

Stack = tuple[OtlpReceiver, CompilerDaemon, DaemonProcess, DaemonProcess]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A receiver of traces; a compile daemon, a runtime and a gateway that export to it."""
    root = tmp_path_factory.mktemp("traces")
    write_checkpoint(root / "tiny", "llama")
    with pytest.MonkeyPatch.context() as patch, OtlpReceiver() as receiver:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        with (
            CompilerDaemon("", root / "compiler") as compiler,
            DaemonProcess(
                "runtime_service", "--listen", "127.0.0.1:0", "--metrics-listen", "",
                "--store", f"grpc://{compiler.address}", "--cache", str(root / "cache"),
                "--compiler", compiler.address, "--arch", "cpu", "--kv-bytes", str(8 << 20),
            ) as runtime,
            DaemonProcess(
                "runtime_service.gateway", "--listen", "127.0.0.1:0", "--metrics-listen", "",
                "--http-listen", "127.0.0.1:0", "--runtimes", runtime.address, "--poll-s", "0.2",
            ) as gateway,
        ):  # fmt: skip
            yield receiver, compiler, runtime, gateway


@pytest.fixture(scope="module")
def load_trace(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> list[ReceivedSpan]:
    """The trace of loading an engine that had to be built, asked for in a program's span."""
    receiver, compiler, runtime, gateway = stack
    checkpoint = tmp_path_factory.getbasetemp() / "traces0" / "tiny"
    tracer = TracerProvider().get_tracer("program")
    client = Client(compiler.address, runtime.address)
    with client, tracer.start_as_current_span("program") as span:
        client.load_engine("tiny", "fp32", model_uri=str(checkpoint))
    wait_until_answering(gateway.address, 60, lambda: None, must_serve=True)
    trace = format_trace_id(span.get_span_context().trace_id)
    return receiver.wait_for(
        trace,
        lambda names: (
            {
                "millrace.runtime.v1.RuntimeService/LoadEngine",
                "millrace.compiler.v1.CompilerService/BuildEngine",
                "build tiny",
                "import",
            }
            <= names
        ),
    )


def path_to(spans: list[ReceivedSpan], name: str) -> list[str]:
    """Service and name of a span and those above it, the highest first."""
    by_id = {span.id: span for span in spans}
    (span,) = [span for span in spans if span.name == name]
    path = [f"{span.service}: {span.name}"]
    while span.parent in by_id:
        parent = by_id[span.parent]
        assert parent.start_ns <= span.start_ns, f"{span.name} began before {parent.name}"
        span = parent
        path.insert(0, f"{span.service}: {span.name}")
    return path


def test_a_load_is_traced_through_the_compile_daemon_to_its_worker(
    load_trace: list[ReceivedSpan],
) -> None:
    path = path_to(load_trace, "build tiny")
    assert path == [
        "millrace-runtime: millrace.runtime.v1.RuntimeService/LoadEngine",
        "millrace-compiler: millrace.compiler.v1.CompilerService/BuildEngine",
        "millrace-compiler: build tiny",
    ]
    (build,) = [span for span in load_trace if span.name == "build tiny"]
    assert build.attributes["millrace.outcome"] == "SUCCEEDED"
    stages = [span for span in load_trace if span.parent == build.id]
    assert {"import"} <= {stage.name for stage in stages}
    assert all(build.start_ns <= s.start_ns <= s.end_ns <= build.end_ns for s in stages)


def test_a_generation_is_traced_from_client_to_engine(
    stack: Stack, load_trace: list[ReceivedSpan]
) -> None:
    receiver, _, runtime, gateway = stack
    tracer = TracerProvider().get_tracer("program")
    client = Client(runtime=gateway.address)
    with client, tracer.start_as_current_span("program") as span:
        result = client.generate("hello", max_new_tokens=6, ignore_end_tokens=True).wait()
    trace = format_trace_id(span.get_span_context().trace_id)
    name = "millrace.runtime.v1.RuntimeService/GenerateStream"
    all_names = {name, "route", "run", "text_completion tiny", "decode"}
    spans = receiver.wait_for(trace, lambda names: all_names <= names)
    assert path_to(spans, "decode") == [
        f"millrace-gateway: {name}",
        "millrace-gateway: route",
        "millrace-gateway: run",
        "millrace-runtime: text_completion tiny",
        "millrace-runtime: decode",
    ]
    top = next(s for s in spans if s.name == name)
    assert top.parent == f"{span.get_span_context().span_id:016x}"
    generation = next(s for s in spans if s.name == "text_completion tiny")
    assert generation.attributes["gen_ai.usage.input_tokens"] == result.prompt_tokens
    assert generation.attributes["gen_ai.usage.output_tokens"] == 6
    assert generation.attributes["gen_ai.request.model"] == "tiny"
    phases = [s for s in spans if s.parent == generation.id]
    assert [s.name for s in sorted(phases, key=lambda s: s.start_ns)] == [
        "tokenize", "queue", "prefill", "decode",
    ]  # fmt: skip
    for before, after in pairwise(phases):
        assert abs(after.start_ns - before.end_ns) < 1_000_000
    line = runtime.wait_for("generation_finished", trace_id=trace)
    assert line["generated_tokens"] == 6


async def test_generations_of_one_call_belong_each_to_the_trace_that_asked(
    stack: Stack, load_trace: list[ReceivedSpan]
) -> None:
    """A call carries several traces: its metadata cannot say whose a generation is."""
    receiver, _, _, gateway = stack
    tracer = TracerProvider().get_tracer("program")
    traces = []
    async with AsyncClient(runtime=gateway.address) as client, client.session() as session:
        for _ in range(2):
            with tracer.start_as_current_span("program") as span:
                traces.append(format_trace_id(span.get_span_context().trace_id))
                await session.generate([5, 9], max_new_tokens=3, ignore_end_tokens=True).wait()
    for trace in traces:
        all_names = {"route", "run", "text_completion tiny", "decode"}
        spans = receiver.wait_for(trace, lambda names, wanted=all_names: wanted <= names)  # type: ignore[misc]
        assert path_to(spans, "decode")[:2] == ["millrace-gateway: route", "millrace-gateway: run"]


def test_a_refused_call_is_an_error_in_its_trace(
    stack: Stack, load_trace: list[ReceivedSpan]
) -> None:
    receiver, _, runtime, _ = stack
    tracer = TracerProvider().get_tracer("program")
    client = Client(runtime=runtime.address)
    with client, tracer.start_as_current_span("program") as span, pytest.raises(MillraceError):
        client.generate([5], max_new_tokens=3, top_p=7.0).wait()
    trace = format_trace_id(span.get_span_context().trace_id)
    name = "millrace.runtime.v1.RuntimeService/GenerateStream"
    spans = receiver.wait_for(trace, lambda names: {name, "text_completion tiny"} <= names)
    by_name = {s.name: s for s in spans}
    assert by_name[name].is_error
    assert by_name[name].attributes["rpc.response.status_code"] == "INVALID_ARGUMENT"
    assert by_name["text_completion tiny"].attributes["error.type"] == "INVALID_FIELD"


def test_a_request_over_http_is_traced_like_a_call(
    stack: Stack, load_trace: list[ReceivedSpan]
) -> None:
    receiver, _, _, gateway = stack
    trace, parent = "5" * 32, "7" * 16
    address = gateway.wait_for("http_started")["address"]
    body = json.dumps({"model": "tiny", "prompt": "hello", "max_tokens": 4}).encode()
    headers = {"traceparent": f"00-{trace}-{parent}-01", "content-type": "application/json"}
    request = Request(f"http://{address}/v1/completions", body, headers)
    with urlopen(request, timeout=60) as response:
        assert response.status == 200
    name = "POST /v1/completions"
    all_names = {name, "route tiny", "run", "text_completion tiny", "decode"}
    spans = receiver.wait_for(trace, lambda names: all_names <= names)
    assert path_to(spans, "decode")[:2] == [
        f"millrace-gateway: {name}",
        "millrace-gateway: route tiny",
    ]
    assert next(s for s in spans if s.name == name).parent == parent
