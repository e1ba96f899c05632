"""The main job with real daemons: checkpoint, compile daemon, store, runtime daemon, tokens."""

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import torch
import transformers
from grpc_health.v1 import health_pb2, health_pb2_grpc
from millrace.runtime.v1 import runtime_pb2 as pb
from millrace.runtime.v1 import runtime_pb2_grpc

from compiler_service.checkpoints.sources import open_checkpoint
from compiler_service.models import lower_model
from kernels.reference import prompt_batch, run
from shared.errors import reason_of
from tests.checkpoints import write_checkpoint
from tests.compiler_service.dense_weights import dense_weights
from tests.compiler_service.quantized_folders import awq, write_quantized
from tests.integration.compiler_daemon import CompilerDaemon
from tests.integration.daemon_process import DaemonProcess

pytestmark = pytest.mark.redis

PROMPT = [5, 9, 40, 77, 3, 12, 60, 8]
NUM_TOKENS = 24


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", "llama")


@pytest.fixture
def daemons(
    redis_url: str, tmp_path: Path, checkpoint: Path
) -> Iterator[tuple[CompilerDaemon, DaemonProcess]]:
    with serving_daemons(redis_url, tmp_path, checkpoint, "fp32") as both:
        yield both


@contextmanager
def serving_daemons(
    redis_url: str, tmp_path: Path, checkpoint: Path, quant: str
) -> Iterator[tuple[CompilerDaemon, DaemonProcess]]:
    """A compile daemon, and a runtime daemon with a store of its own that asks it for an engine."""
    with (
        CompilerDaemon(redis_url, tmp_path / "compiler") as compiler,
        DaemonProcess(
            "runtime_service",
            "--listen", "127.0.0.1:0", "--metrics-listen", "",
            "--redis-url", redis_url, "--store", f"grpc://{compiler.address}",
            "--cache", str(tmp_path / "runtime"), "--compiler", compiler.address,
            "--model", "tiny", "--model-uri", str(checkpoint), "--quant", quant,
            "--arch", "cpu", "--kv-bytes", str(8 << 20),
        ) as runtime,
    ):  # fmt: skip
        yield compiler, runtime


async def test_a_checkpoint_becomes_the_tokens_that_transformers_gives(
    daemons: tuple[CompilerDaemon, DaemonProcess], checkpoint: Path
) -> None:
    """Built, pulled over gRPC, loaded and generated: and every token is the reference's."""
    _, runtime = daemons
    async with grpc.aio.insecure_channel(runtime.address) as channel:
        await serving(channel)
        stub: Any = runtime_pb2_grpc.RuntimeServiceStub(channel)
        events = await generate(stub, [start("a"), start("b")])
    expected = greedy(checkpoint)
    for request_id in ("a", "b"):
        assert token_ids(events[request_id]) == expected
        finished = events[request_id][-1].finished
        assert finished.samples[0].reason == pb.FINISH_REASON_LENGTH
        assert finished.usage.generated_tokens == NUM_TOKENS


async def test_a_quantized_checkpoint_is_served_as_it_is(redis_url: str, tmp_path: Path) -> None:
    """Asked for by the runtime, built, pulled, loaded; on a CPU with bf16 activations, so a token
    may be the reference's second choice where the two are close."""
    folder = tmp_path / "awq"
    write_quantized(folder, *awq())
    with serving_daemons(redis_url, tmp_path, folder, "as-is") as (_, runtime):
        async with grpc.aio.insecure_channel(runtime.address) as channel:
            await serving(channel)
            stub: Any = runtime_pb2_grpc.RuntimeServiceStub(channel)
            tokens = token_ids((await generate(stub, [start("a")]))["a"])
    checkpoint = open_checkpoint(str(folder))
    graph = lower_model(checkpoint.config, "float32")
    weights = dense_weights(graph, checkpoint, torch.float32)
    ids = torch.tensor(PROMPT + tokens[:-1], dtype=torch.int32)
    logits = run(graph, weights, ids, prompt_batch(graph, [len(ids)]))["logits"]
    logits = logits[len(PROMPT) - 1 :]
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert len(tokens) == NUM_TOKENS
    assert float((logits.amax(1) - chosen).max()) <= 0.25
    assert float(logits.std()) > 1.0


async def test_sigterm_ends_every_stream_once_and_then_the_daemon(
    daemons: tuple[CompilerDaemon, DaemonProcess],
) -> None:
    """Under load: what runs finishes within the grace, what comes is refused, the process exits."""
    _, runtime = daemons
    async with grpc.aio.insecure_channel(runtime.address) as channel:
        await serving(channel)
        stub: Any = runtime_pb2_grpc.RuntimeServiceStub(channel)
        call = stub.Generate()
        running = [str(index) for index in range(20)]
        for request_id in running:
            await call.write(start(request_id, 100, credit_tokens=10))
        events: dict[str, list[pb.Event]] = {}
        await collect(call, events, until=lambda: len(events) == len(running))
        runtime.send(signal.SIGTERM)
        await health(channel, health_pb2.HealthCheckResponse.NOT_SERVING)
        await call.write(start("late", 100))
        await collect(call, events, until=lambda: "late" in events)
        # Without it they would run for ever: none was at its end before the late one came.
        for request_id in running:
            credit = pb.AddCredit(request_id=request_id, tokens=100)
            await call.write(pb.GenerateRequest(credit=credit))
        await call.done_writing()
        await collect(call, events, until=lambda: False)
    for request_id in running:
        terminal = [e for e in events[request_id] if e.WhichOneof("event") in ("finished", "error")]
        assert len(terminal) == 1, request_id
        assert terminal[0].finished.usage.generated_tokens == 100
    assert [reason_of(event.error) for event in events["late"]] == ["DRAINING"]
    assert await asyncio.to_thread(runtime.process.wait, 60) == 0


async def test_a_killed_engine_process_ends_streams_once_and_the_daemon_recovers(
    daemons: tuple[CompilerDaemon, DaemonProcess], checkpoint: Path
) -> None:
    """ENGINE_LOST to all that ran, then a new process answers as the old one did."""
    _, runtime = daemons
    async with grpc.aio.insecure_channel(runtime.address) as channel:
        await serving(channel)
        stub: Any = runtime_pb2_grpc.RuntimeServiceStub(channel)
        call = stub.Generate()
        for request_id in ("a", "b"):
            await call.write(start(request_id, 110, credit_tokens=10))
        events: dict[str, list[pb.Event]] = {}
        await collect(call, events, until=lambda: len(events) == 2)
        (engine,) = engine_processes(runtime.process.pid)
        engine.kill()
        await call.done_writing()
        await collect(call, events, until=lambda: False)
        for request_id in ("a", "b"):
            assert reason_of(events[request_id][-1].error) == "ENGINE_LOST"
        await serving(channel)
        again = await generate(stub, [start("c")])
    assert token_ids(again["c"]) == greedy(checkpoint)


def greedy(checkpoint: Path) -> list[int]:
    """What transformers continues `PROMPT` with."""
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    prompt = torch.tensor([PROMPT])
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0,
        max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS, eos_token_id=None,
    )  # fmt: skip
    return [int(token_id) for token_id in out[0, len(PROMPT) :]]


def start(
    request_id: str, num_tokens: int = NUM_TOKENS, credit_tokens: int | None = None
) -> pb.GenerateRequest:
    """A greedy generation of `num_tokens`, whatever they are; it waits where its credit is used up."""
    return pb.GenerateRequest(
        start=pb.StartGeneration(
            request_id=request_id,
            token_ids=pb.TokenIds(ids=PROMPT),
            stop=pb.StopConditions(max_new_tokens=num_tokens, ignore_end_tokens=True),
            credit_tokens=credit_tokens,
        )
    )


def token_ids(events: list[pb.Event]) -> list[int]:
    """All tokens among `events`."""
    return [token_id for event in events for token_id in event.tokens.token_ids]


def engine_processes(pid: int) -> list[psutil.Process]:
    """The engine processes of the runtime daemon `pid`."""
    children = psutil.Process(pid).children()
    return [child for child in children if "runtime_service.engine_main" in child.cmdline()]


async def serving(channel: grpc.aio.Channel) -> None:
    """Returns when health says SERVING."""
    await health(channel, health_pb2.HealthCheckResponse.SERVING)


async def health(channel: grpc.aio.Channel, wanted: int) -> None:
    """Returns when health says `wanted`."""
    stub: Any = health_pb2_grpc.HealthStub(channel)
    async with asyncio.timeout(120):
        async for answer in stub.Watch(health_pb2.HealthCheckRequest()):
            if answer.status == wanted:
                return


async def generate(stub: Any, starts: list[pb.GenerateRequest]) -> dict[str, list[pb.Event]]:
    """All events of one call, by generation."""
    call = stub.Generate()
    for request in starts:
        await call.write(request)
    await call.done_writing()
    events: dict[str, list[pb.Event]] = {}
    await collect(call, events, until=lambda: False)
    return events


async def collect(call: Any, events: dict[str, list[pb.Event]], until: Any) -> None:
    """Reads events until `until` holds or the call ends."""
    async with asyncio.timeout(120):
        while not until():
            response = await call.read()
            if response is grpc.aio.EOF:
                return
            for event in response.events:
                events.setdefault(event.request_id, []).append(event)
