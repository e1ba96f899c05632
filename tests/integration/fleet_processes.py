"""A whole fleet as processes: Valkey, compile daemons, runtimes of one deployment, a gateway."""

import asyncio
import random
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import grpc
import torch
from millrace.fleet.v1 import fleet_pb2, fleet_pb2_grpc
from millrace.runtime.v1 import runtime_pb2 as pb
from millrace.runtime.v1 import runtime_pb2_grpc

from runtime_service.sampling.noise import NoiseKey, noise_of
from shared.redis import EmbeddedRedis
from tests.checkpoints import write_checkpoint
from tests.integration.compiler_daemon import CompilerDaemon
from tests.integration.daemon_process import DaemonProcess
from tests.runtime_service.daemon import Seen

# A difference is allowed only at a first token whose two best scores lie closer than this.
TIE = 1e-4
# What takes so long hangs.
HANG_S = 240.0


class FleetProcesses:
    """What runs, under `root`; a context manager that ends all of it."""

    def __init__(
        self,
        root: Path,
        num_runtimes: int = 3,
        num_compilers: int = 2,
        runtime_flags: Sequence[str] = ("--max-sequences", "128"),
    ) -> None:
        self._root = root
        self._runtime_flags = runtime_flags
        self._num_runtimes, self._num_compilers = num_runtimes, num_compilers
        self._stack = ExitStack()
        self.checkpoint = write_checkpoint(root / "tiny", "llama")
        self.redis = EmbeddedRedis(root / "redis")
        self.compilers: list[CompilerDaemon] = []
        self.runtimes: list[DaemonProcess] = []

    def __enter__(self) -> Self:
        self._stack.enter_context(self.redis)
        # The first one builds; the others take requests and watch.
        for index in range(self._num_compilers):
            self.compilers.append(self.new_compiler(*(("--no-worker",) if index else ())))
        for _ in range(self._num_runtimes):
            self.runtimes.append(self.new_runtime())
        self.gateway = self._stack.enter_context(
            DaemonProcess(
                "runtime_service.gateway",
                "--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0",
                "--http-listen", "127.0.0.1:0",
                "--redis-url", self.redis.url, "--poll-s", "0.3", "--silent-s", "60",
            )
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def http_address(self) -> str:
        """Where the gateway speaks HTTP."""
        return str(self.gateway.wait_for("http_started")["address"])

    def new_compiler(self, *flags: str, **options: float) -> CompilerDaemon:
        """Another compile daemon of the same queue and store."""
        daemon = CompilerDaemon(self.redis.url, self._root, *flags, **options)
        return self._stack.enter_context(daemon)

    def new_runtime(self) -> DaemonProcess:
        """Another runtime, which waits for the deployment to say what to serve."""
        return self._stack.enter_context(
            DaemonProcess(
                "runtime_service",
                "--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0", "--arch", "cpu",
                "--redis-url", self.redis.url, "--store", str(self._root / "store"),
                "--compiler", self.compilers[0].address, "--deployment", "chat",
                "--heartbeat-s", "1", "--num-threads", "1",
                "--kv-bytes", str(24 << 20), *self._runtime_flags,
            )
        )  # fmt: skip


class FleetClient:
    """A client of the gateway of `fleet`."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.stub: Any = runtime_pb2_grpc.RuntimeServiceStub(channel)
        self.fleet: Any = fleet_pb2_grpc.FleetServiceStub(channel)

    async def deploy(self, checkpoint: Path, replicas: int) -> None:
        """Has so many runtimes serve the checkpoint, built first; returns when they do."""
        wanted = fleet_pb2.Deployment(
            name="chat", model="tiny", model_uri=str(checkpoint), replicas=replicas
        )
        wanted.quant.scheme = "fp32"
        request = fleet_pb2.ApplyDeploymentRequest(deployment=wanted)
        await self.fleet.ApplyDeployment(request, wait_for_ready=True)
        await self.ready(replicas)

    async def ready(self, replicas: int) -> None:
        """Returns when so many replicas are ready."""
        found = fleet_pb2.GetFleetResponse()
        deadline_s = time.monotonic() + HANG_S
        while not any(d.ready_replicas >= replicas for d in found.deployments):
            assert time.monotonic() < deadline_s, f"they are not ready: {found}"
            await asyncio.sleep(0.1)
            found = await self.fleet.GetFleet(fleet_pb2.GetFleetRequest())

    async def used_blocks(self) -> int:
        """KV blocks that sequences hold, over all runtimes that answer; cached ones are free."""
        found = await self.fleet.GetFleet(fleet_pb2.GetFleetRequest())
        return sum(
            runtime.num_blocks - runtime.load.free_blocks
            for runtime in found.runtimes
            if runtime.state == pb.RUNTIME_STATE_SERVING
        )

    async def freed(self, limit_s: float = HANG_S) -> None:
        """Returns when no runtime holds a block for a sequence."""
        async with asyncio.timeout(limit_s):
            while await self.used_blocks():  # noqa: ASYNC110 - no event tells
                await asyncio.sleep(0.02)


def random_start(number: int, max_new_tokens: tuple[int, int]) -> pb.StartGeneration:
    """A generation whose tokens follow from its number: greedy ones and seeded ones."""
    draw = random.Random(number)
    start = pb.StartGeneration(
        request_id=str(number),
        token_ids=pb.TokenIds(ids=[draw.randrange(300) for _ in range(draw.randrange(2, 24))]),
        stop=pb.StopConditions(
            max_new_tokens=draw.randrange(*max_new_tokens), ignore_end_tokens=True
        ),
        model="chat",
    )
    if number % 2:
        start.sampling.temperature, start.sampling.seed = 1.0, number
    return start


async def is_near_tie(stub: Any, start: pb.StartGeneration, one: Seen, other: Seen) -> bool:
    """Claims that two runs of `start` part where the two best scores are as good as equal."""
    ours, theirs = one.token_ids[0], other.token_ids[0]
    cut = next(n for n, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    again = pb.StartGeneration()
    again.CopyFrom(start)
    again.resumed_token_ids.extend(ours[:cut])
    again.stop.max_new_tokens = cut + 1
    again.sampling.top_logprobs = 20
    seen = Seen()
    async for response in stub.GenerateStream(pb.GenerateStreamRequest(start=again)):
        for event in response.events:
            seen.add(event)
    (row,) = (row for chunk in seen.chunks for row in chunk.logprobs)
    scores = {top.token_id: top.logprob for top in row.top}
    scores.setdefault(row.token_id, row.logprob)
    if start.sampling.temperature:
        key = NoiseKey(start.sampling.seed, 0, len(start.token_ids.ids) + cut)
        noise = noise_of([key], torch.tensor([list(scores)]))[0].tolist()
        scores = {t: s + n for (t, s), n in zip(scores.items(), noise, strict=True)}
    pair = (ours[cut], theirs[cut])
    return all(t in scores for t in pair) and abs(scores[pair[0]] - scores[pair[1]]) < TIE
