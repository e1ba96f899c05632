"""Every metric that the manual names moves when what it tells of happens, in real daemons."""

import asyncio
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import grpc
import psutil
import pytest
from millrace.runtime.v1 import runtime_pb2 as pb
from prometheus_client.parser import text_string_to_metric_families

from tests.architecture.test_imports import ROOT
from tests.checkpoints import write_checkpoint
from tests.integration.compiler_daemon import client_of
from tests.integration.fleet_processes import HANG_S, FleetClient, FleetProcesses
from tests.integration.test_compiler_daemon import stopped_child
from tests.runtime_service.daemon import Call

pytestmark = pytest.mark.redis

NAMED = set(re.findall(r"`(millrace_[a-z_]+)`", (ROOT / "docs/OPERATIONS.md").read_text()))
# A fault of ours, which no client can bring about, and what is sampled now and then: tests/shared/test_background.py
# and tests/compiler_service/test_build_queue.py have them move.
ELSEWHERE = {"millrace_background_failures", "millrace_build_queue_length"}
# So few blocks that not all of the sequences that run fit to their ends.
FEW_BLOCKS = ("--kv-bytes", str(512 << 10), "--max-sequences", "8")
PROMPT = list(range(40, 100))


class Metrics:
    """What Prometheus would read from all daemons of a fleet, and what has moved so far."""

    def __init__(self, fleet: FleetProcesses) -> None:
        daemons = (*fleet.compilers, *fleet.runtimes, fleet.gateway)
        self._addresses = [d.wait_for("metrics_started")["address"] for d in daemons]
        self.moved: set[str] = set()

    async def wait_for(self, *names: str) -> None:
        """Looks until all of these have moved."""
        wanted, until_s = {f"millrace_{name}" for name in names}, time.monotonic() + HANG_S
        while not wanted <= self.moved:
            self.moved |= await asyncio.to_thread(self._moving)
            assert time.monotonic() < until_s, f"{wanted - self.moved} did not move"

    def _moving(self) -> set[str]:
        found = set()
        for address in self._addresses:
            with urlopen(f"http://{address}/metrics", timeout=HANG_S) as response:
                text = response.read().decode()
            for family in text_string_to_metric_families(text):
                if any(s.value > 0 and not s.name.endswith("_created") for s in family.samples):
                    found.add(family.name)
        return found


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[FleetProcesses]:
    """Two runtimes with little room, a compile daemon that builds, a gateway."""
    with FleetProcesses(tmp_path, 2, 1, FEW_BLOCKS) as fleet:
        yield fleet


async def test_every_metric_in_the_manual_moves(fleet: FleetProcesses, tmp_path: Path) -> None:
    metrics = Metrics(fleet)
    async with (
        grpc.aio.insecure_channel(fleet.gateway.address) as channel,
        client_of(fleet.compilers[0]) as compiler,
    ):
        client = FleetClient(channel)
        await compiler.ask(write_checkpoint(tmp_path / "other", seed=1), "cpu")
        child = await stopped_child(fleet.compilers[0])
        await metrics.wait_for("builds_running")
        os.kill(child, signal.SIGCONT)
        await client.deploy(fleet.checkpoint, 2)
        await overload(client, metrics)
        await lose_engines(fleet, client, metrics)
        await lose_a_call(client, metrics)
    assert metrics.moved >= NAMED - ELSEWHERE


async def overload(client: FleetClient, metrics: Metrics) -> None:
    """More than runs at once, and more than fits; then a prompt that was seen before."""
    call = Call(client.stub.Generate())
    for number in range(48):
        await call.start(
            str(number),
            PROMPT[number:] + PROMPT,
            max_new_tokens=350,
            model="chat",
            ignore_end_tokens=True,
        )
    await metrics.wait_for(
        "running_sequences", "waiting_sequences", "waiting_tokens", "step_tokens", "kv_used_ratio",
        "rpcs_running", "gateway_running_generations",
    )  # fmt: skip
    seen = await call.finish()
    assert all(one.finished for one in seen.values())
    call = Call(client.stub.Generate())
    for name in ("first", "again"):
        await call.start(name, PROMPT, max_new_tokens=2, model="chat")
        await call.read_to_end(name)
    await call.finish()
    await metrics.wait_for("preemptions", "prefix_cache_hit_tokens")


async def lose_engines(fleet: FleetProcesses, client: FleetClient, metrics: Metrics) -> None:
    """All at once, so that generations wait for one."""
    call = Call(client.stub.Generate())
    await call.start(
        "a", PROMPT, max_new_tokens=40, credit_tokens=10, model="chat", ignore_end_tokens=True
    )
    await call.read_until(lambda: call.num_tokens("a") == 10)
    for runtime in fleet.runtimes:
        (engine,) = (
            child
            for child in psutil.Process(runtime.process.pid).children(recursive=True)
            if "engine_main" in " ".join(child.cmdline())
        )
        engine.send_signal(signal.SIGKILL)
    await metrics.wait_for("engine_restarts", "gateway_waiting_generations")
    await call.let_go_on("a")
    assert (await call.finish())["a"].finished


async def lose_a_call(client: FleetClient, metrics: Metrics) -> None:
    """A client goes on with its generation on another call."""
    call = Call(client.stub.Generate())
    await call.start(
        "a", PROMPT, max_new_tokens=40, credit_tokens=10, model="chat", ignore_end_tokens=True
    )
    await call.read_until(lambda: call.num_tokens("a") == 10)
    events = [event for message in call.messages for event in message.events]
    (name,) = (e.started.generation_id for e in events if e.HasField("started"))
    call.raw.cancel()
    again = Call(client.stub.Generate())
    resume = pb.ResumeGeneration(request_id="a", generation_id=name, received_tokens=[10])
    await again.send(resume=resume)
    seen = await again.finish()
    assert seen["a"].finished
    await metrics.wait_for("gateway_resumed_generations", "gateway_moved_generations")
