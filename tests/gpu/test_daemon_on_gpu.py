"""Real daemons on a GPU: a record of `millrace tune` reaches a runtime that comes later; a storm leaves nothing."""

import asyncio
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from millrace.runtime.v1 import runtime_pb2 as pb
from millrace.runtime.v1 import runtime_pb2_grpc

from bench.gpu_kernels import write
from bench.gpu_served import write_engine
from kernels.lowering import sites, variants
from kernels.regimes import REGIMES
from kernels.variant import CODE_TITLE, INDEX_TITLE
from runtime_service.device_full import device_full
from runtime_service.execution.loading import load_runner
from runtime_service.execution.options import RunnerOptions
from runtime_service.execution.tuned import site_of
from shared.errors import DeviceFull
from shared.redis import EmbeddedRedis
from shared.store import LocalStore
from shared.tuning import record_from_json
from tests.gpu.device import device_arch, layers_of
from tests.gpu.test_executor_on_gpu import tiny_graph
from tests.integration.compiler_daemon import CompilerDaemon
from tests.integration.daemon_process import DaemonProcess

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

_NUM_STREAMS = 300


def test_runtime_goes_by_the_record_that_another_machine_published(tmp_path: Path) -> None:
    central = _published(tmp_path / "central/store")
    with (
        EmbeddedRedis(tmp_path / "redis") as redis,
        CompilerDaemon(redis.url, tmp_path / "central") as compiler,
    ):
        command = [sys.executable, "-m", "millrace.cli", "tune", "tiny", "--quant", "bf16"]
        command += ["--store", str(tmp_path / "tuned"), "--compiler", compiler.address, "--json"]
        said = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        assert said["published"] == ["local", "remote"]
        with _runtime(tmp_path / "later", "--compiler", compiler.address) as runtime:
            applied = runtime.wait_for("tuning_applied")
            assert asyncio.run(_generated(runtime.address)) == 8
    (engine,) = central.list()
    (blob,) = engine.tunings
    record = record_from_json(
        central.read_all(blob.digest), gpu=blob.title, engine=engine.manifest.digest
    )
    graph, arch = tiny_graph("bf16"), device_arch()
    measured = {site_of(row) for row in record.sites}
    assert measured == {site for regime in REGIMES for site in sites(graph, arch, regime)}
    changed = [row for row in record.sites if row.choice != row.built_in]
    assert (applied["gpu"], applied["sites"]) == (torch.cuda.get_device_name(), len(changed))


def test_streams_that_are_cancelled_behind_relays_leave_no_block(tmp_path: Path) -> None:
    """On calls of their own, each at a random moment; whoever comes then is served."""
    _published(tmp_path / "store")
    with _runtime(tmp_path / "store", "--relays", "2", "--max-sequences", "64") as runtime:
        asyncio.run(_storm(runtime.address))


def test_gpu_that_others_fill_is_told_in_a_line(tmp_path: Path) -> None:
    store = _published(tmp_path / "store")
    (engine,) = store.list()
    torch.cuda.empty_cache()
    others = torch.empty(torch.cuda.mem_get_info()[0] - (8 << 20), dtype=torch.uint8, device="cuda")
    try:
        with (
            pytest.raises(DeviceFull, match=r"Tried to allocate .+ is free|out of memory"),
            device_full(engine.name),
        ):
            load_runner(store, engine, RunnerOptions(kv_bytes=1 << 22))
    finally:
        del others
        torch.cuda.empty_cache()
    load_runner(store, engine, RunnerOptions(kv_bytes=1 << 22)).runner.warm_up()


async def _storm(address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = runtime_pb2_grpc.RuntimeServiceStub(channel)
        before = (await stub.GetStatus(pb.GetStatusRequest())).load
        came = await asyncio.gather(*(_cancelled(stub, number) for number in range(_NUM_STREAMS)))
        assert sum(came) > _NUM_STREAMS, "hardly one of them had begun"
        async with asyncio.timeout(5.0):
            while True:
                load = (await stub.GetStatus(pb.GetStatusRequest())).load
                if load.free_blocks == before.free_blocks and not load.running_sequences:
                    break
                await asyncio.sleep(0.02)  # no event tells
        assert load.waiting_sequences == load.waiting_tokens == 0
    assert await _generated(address) == 8


async def _cancelled(stub: Any, number: int) -> int:
    """Tokens of a stream that is cancelled after some of its events."""
    draw = random.Random(number)
    call = stub.GenerateStream(_start([draw.randrange(1000) for _ in range(9)], 400))
    came = 0
    for _ in range(draw.randrange(12)):
        response = await call.read()
        came += sum(len(event.tokens.token_ids) for event in response.events)
    call.cancel()
    return came


async def _generated(address: str) -> int:
    """Tokens that come of a generation of 8."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = runtime_pb2_grpc.RuntimeServiceStub(channel)
        call = stub.GenerateStream(_start(range(5, 14), 8))
        return sum([len(event.tokens.token_ids) async for r in call for event in r.events])


def _start(token_ids: "list[int] | range", max_new_tokens: int) -> pb.GenerateStreamRequest:
    stop = pb.StopConditions(max_new_tokens=max_new_tokens, ignore_end_tokens=True)
    start = pb.StartGeneration(token_ids=pb.TokenIds(ids=token_ids), stop=stop)
    return pb.GenerateStreamRequest(start=start)


def _published(root: Path) -> LocalStore:
    """A store with an engine of the tiny graph, for this GPU."""
    arch = device_arch()
    index, code = layers_of(variants(tiny_graph("bf16"), arch, with_candidates=True), arch)
    kernels = root.parent / "kernels"
    kernels.mkdir(parents=True)
    write(kernels, f"{arch.name}.models", [(INDEX_TITLE, index), (CODE_TITLE, code)])
    write_engine(root, kernels, "tiny", "bf16", arch.name)
    return LocalStore(root)


@contextmanager
def _runtime(store: Path, *flags: str) -> Iterator[DaemonProcess]:
    """A runtime that serves the engine from `store`."""
    flags = (*flags, "--listen", "127.0.0.1:0", "--metrics-listen", "", "--store", str(store))
    flags = (*flags, "--model", "tiny", "--quant", "bf16", "--kv-bytes", str(1 << 24))
    with DaemonProcess("runtime_service", *flags) as runtime:
        _wait_serving(runtime.address)
        yield runtime


def _wait_serving(address: str, timeout_s: float = 60.0) -> None:
    with grpc.insecure_channel(address) as channel:
        watched = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(), timeout=timeout_s
        )
        for health in watched:
            if health.status == health_pb2.HealthCheckResponse.SERVING:
                return
