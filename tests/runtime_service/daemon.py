"""A runtime daemon inside the test's own loop: real gRPC, a real engine process that echoes."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from millrace.runtime.v1 import runtime_pb2 as pb
from millrace.runtime.v1 import runtime_pb2_grpc
from prometheus_client import CollectorRegistry

from compiler_service.checkpoints.byte_tokenizer import byte_tokenizer, byte_tokenizer_files
from runtime_service.daemon import tell_changes
from runtime_service.engine_client import EngineClient
from runtime_service.engine_core import OnPhase
from runtime_service.engine_process import EngineSpec
from runtime_service.engine_source import EngineSource
from runtime_service.engine_starter import OnLost
from runtime_service.metrics import RuntimeMetrics
from runtime_service.relay.relays import Relays
from runtime_service.runtime import Runtime
from runtime_service.served_engine import EngineText
from runtime_service.service import RuntimeService
from shared.engine import (
    FILE_TYPE,
    GRAPH_TYPE,
    EngineDraft,
    EngineKey,
    EngineManifest,
    EngineSelector,
    QuantConfig,
)
from shared.security import ServerSecurity
from shared.server import OPEN, DaemonServer, daemon_registry
from shared.store import LocalStore
from tests.runtime_service.echo_engine import LOADER, VOCAB_SIZE

TOKENIZER = byte_tokenizer()
FP32 = QuantConfig("fp32")
# What takes so long hangs; no test may depend on it, however busy the machine is.
HANG_S = 180.0
# Arguments of an engine on which a generation of ENDLESS_TOKENS is not at its end before a test ends it.
ENDLESS = {"max_sequence_tokens": 1 << 16, "num_blocks": 1 << 14}
ENDLESS_TOKENS = 60_000


def publish_echo(
    store: LocalStore,
    model: str = "echo",
    arch_error: bool = False,
    format_version: int = 1,
    builder: str = "test",
    chat_template: str = "",
) -> EngineManifest:
    """An engine with the tests' tokenizer and nothing to compute.

    Args:
        arch_error: its process cannot load it.
        builder: another one's engine is another engine of the model, and as good.
        chat_template: in the place of the tokenizer's own.
    """
    graph = json.dumps({"config": {"vocab_size": VOCAB_SIZE}}).encode()
    layers = [store.write_blob([graph], GRAPH_TYPE, "graph.json")]
    files = {**byte_tokenizer_files(), "name.txt": model.encode()}
    if chat_template:
        files["chat_template.jinja"] = chat_template.encode()
    for name, content in files.items():
        layers.append(store.write_blob([content], FILE_TYPE, name))
    if arch_error:
        layers.append(store.write_blob([b"x"], FILE_TYPE, "broken"))
    key = EngineKey(model.encode().hex().ljust(64, "0"), "cpu", FP32, builder)
    return store.publish(EngineDraft(key, model, tuple(layers), {}, format_version))


@dataclass
class Daemon:
    """What a test holds of a running daemon."""

    runtime: Runtime
    server: DaemonServer
    store: LocalStore
    channel: grpc.aio.Channel
    stub: Any
    arguments: dict[str, Any]
    registry: CollectorRegistry

    @property
    def client(self) -> EngineClient:
        """The client of the engine process that serves now."""
        assert self.runtime.served is not None, "nothing is served"
        return self.runtime.served.client

    async def freed(self) -> None:
        """Waits until the engine process says that no sequence holds a block."""

        def is_free() -> bool:
            client, stats = self.client, self.client.stats
            if client._outbox or client._is_working():
                return False
            return stats is None or not (stats.num_running or stats.num_waiting)

        await until(is_free)

    def call(self) -> "Call":
        """A new call of Generate."""
        return Call(self.stub.Generate())

    def health(self) -> Any:
        """A stream of what health checks are told, beginning with what holds now."""
        stub = health_pb2_grpc.HealthStub(self.channel)
        return stub.Watch(health_pb2.HealthCheckRequest())

    async def load(self, model: str = "echo") -> EngineManifest:
        """Serves the engine of `model`."""
        return await self.runtime.load(EngineSelector(model, "cpu", FP32), "")


@asynccontextmanager
async def running_daemon(
    folder: Path,
    *,
    max_waiting_tokens: int = 0,
    max_message_bytes: int = 1 << 20,
    loader: str = LOADER,
    publish: Callable[[LocalStore], EngineManifest] = publish_echo,
    security: ServerSecurity = OPEN,
    relays: int = 0,
    exchange_s: float = HANG_S,
    **arguments: Any,
) -> AsyncIterator[Daemon]:
    """A daemon that serves the echo engine, or what `publish` and `loader` make of one.

    Args:
        arguments: the engine's.
    """
    store = LocalStore(folder / "store")
    engine = publish(store)
    metrics = RuntimeMetrics()
    changed = asyncio.Event()

    async def start_client(
        engine: EngineManifest, on_lost: OnLost, on_phase: OnPhase
    ) -> EngineClient:
        spec = EngineSpec(
            loader,
            {"store": str(store.root), "engine": engine.name, **arguments},
            log_level="error",
        )
        return await EngineClient.start(
            spec,
            metrics,
            max_waiting_tokens=max_waiting_tokens,
            load_timeout_s=HANG_S,
            step_timeout_s=HANG_S,
            on_lost=on_lost,
            on_phase=on_phase,
        )

    runtime = Runtime(
        arch="cpu",
        source=EngineSource(store, None, ""),
        read_text=lambda engine: EngineText.read(store, engine),
        start_client=start_client,
        metrics=metrics,
        on_change=changed.set,
        exchange_s=exchange_s,
    )
    registry = daemon_registry()
    registry.register(metrics)
    entrance = Relays(relays, max_message_bytes, security, "error") if relays else None
    server = DaemonServer("127.0.0.1:0", max_message_bytes, registry, security, entrance)
    runtime_pb2_grpc.add_RuntimeServiceServicer_to_server(RuntimeService(runtime), server.grpc)
    await server.start("millrace.runtime.v1.RuntimeService", is_serving=False)
    telling = asyncio.create_task(tell_changes(server, runtime, None, changed))
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = runtime_pb2_grpc.RuntimeServiceStub(channel)
        daemon = Daemon(runtime, server, store, channel, stub, arguments, registry)
        try:
            await runtime.load(EngineSelector(engine.model, "cpu", engine.key.quant), "")
            yield daemon
        finally:
            telling.cancel()
            await runtime.close()
            await server.stop()


@dataclass
class Seen:
    """What a client has seen of one generation."""

    seed: int | None = None
    prompt_tokens: int = 0
    token_ids: dict[int, list[int]] = field(default_factory=dict)
    text: dict[int, str] = field(default_factory=dict)
    chunks: list[pb.TokenChunk] = field(default_factory=list)
    finished: pb.GenerationFinished | None = None
    error: Any = None
    num_terminal: int = 0

    def add(self, event: pb.Event) -> None:
        """Takes an event; nothing may follow a terminal one."""
        assert not self.num_terminal, f"{event} came after the terminal event"
        kind = event.WhichOneof("event")
        if kind == "started":
            self.seed, self.prompt_tokens = event.started.seed, event.started.prompt_tokens
        elif kind == "tokens":
            chunk = event.tokens
            self.chunks.append(chunk)
            self.token_ids.setdefault(chunk.sample_index, []).extend(chunk.token_ids)
            self.text[chunk.sample_index] = self.text.get(chunk.sample_index, "") + chunk.text
        else:
            self.num_terminal += 1
            if kind == "finished":
                self.finished = event.finished
            else:
                self.error = event.error

    @property
    def reason(self) -> str:
        """Of the first sample's end."""
        assert self.finished is not None, f"it did not finish: {self.error}"
        return pb.FinishReason.Name(self.finished.samples[0].reason).removeprefix("FINISH_REASON_")


class Call:
    """A client's side of one call of Generate."""

    def __init__(self, call: Any) -> None:
        self.raw = call
        self.seen: dict[str, Seen] = {}
        self.messages: list[pb.GenerateResponse] = []

    async def start(self, request_id: str, prompt: str | list[int], **fields: Any) -> None:
        """Starts a generation; `max_new_tokens` and other stop conditions may be given bare."""
        await self.send(start=start_of(prompt, request_id=request_id, **fields))

    async def send(self, **command: Any) -> None:
        """Sends one command."""
        await self.raw.write(pb.GenerateRequest(**command))

    async def let_go_on(self, request_id: str) -> None:
        """Gives a generation all the credit that it needs: one with less waits for it, however late the test is."""
        await self.send(credit=pb.AddCredit(request_id=request_id, tokens=1 << 20))

    async def done(self) -> None:
        """Half-closes."""
        await self.raw.done_writing()

    async def read(self) -> bool:
        """Reads one message; false at the end of the call."""
        message = await self.raw.read()
        if message is grpc.aio.EOF:
            return False
        self.messages.append(message)
        for event in message.events:
            self.seen.setdefault(event.request_id, Seen()).add(event)
        return True

    def num_tokens(self, request_id: str) -> int:
        """Tokens of this generation that were read."""
        return sum(map(len, self.seen.get(request_id, Seen()).token_ids.values()))

    async def read_until(self, condition: Callable[[], bool]) -> None:
        """Reads until `condition` holds."""
        while not condition():
            assert await self.read(), "the call ended"

    async def read_to_end(self, request_id: str) -> Seen:
        """Reads until this generation has ended."""
        await self.read_until(
            lambda: request_id in self.seen and bool(self.seen[request_id].num_terminal)
        )
        return self.seen[request_id]

    async def finish(self) -> dict[str, Seen]:
        """Half-closes and reads to the end of the call."""
        await self.done()
        return await self.read_rest()

    async def read_rest(self) -> dict[str, Seen]:
        """Reads to the end of the call."""
        while await self.read():
            pass
        return self.seen


async def rest_of(call: Any) -> list[pb.Event]:
    """What is left of a GenerateStream call that `read` was used on."""
    events: list[pb.Event] = []
    while (message := await call.read()) is not grpc.aio.EOF:
        events += message.events
    return events


_STOP_FIELDS = set(pb.StopConditions.DESCRIPTOR.fields_by_name)


def start_of(prompt: str | list[int], **fields: Any) -> pb.StartGeneration:
    """A start command; stop conditions may be given bare, and end tokens do not end it."""
    stop = {name: fields.pop(name) for name in list(fields) if name in _STOP_FIELDS}
    start = pb.StartGeneration(stop=pb.StopConditions(**stop), **fields)
    if isinstance(prompt, str):
        start.text = prompt
    else:
        start.token_ids.ids.extend(prompt)
    return start


async def until(condition: Callable[[], Any]) -> None:
    """Waits until `condition` holds, for what no event tells the test."""
    async with asyncio.timeout(HANG_S):
        while not condition():  # noqa: ASYNC110 - see above
            await asyncio.sleep(0.001)


async def still_works(daemon: Daemon) -> None:
    """A new call gets its tokens."""
    call = daemon.call()
    await call.start("after", [40, 41], max_new_tokens=4)
    seen = await call.finish()
    assert seen["after"].token_ids[0] == [40, 41, 40, 41]
