"""`millrace tune` between real daemons on a GPU: measured on one machine, used by a runtime that comes later."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
import torch
from millrace.runtime.v1 import runtime_pb2 as pb
from millrace.runtime.v1 import runtime_pb2_grpc

from bench.gpu_kernels import write
from bench.gpu_served import write_engine
from kernels.lowering import REGIMES, sites, variants
from kernels.variant import CODE_TITLE, INDEX_TITLE
from runtime_service.execution.tuned import site_of
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


def test_runtime_goes_by_the_record_that_another_machine_published(tmp_path: Path) -> None:
    arch, graph = device_arch(), tiny_graph("bf16")
    index, code = layers_of(variants(graph, arch, with_candidates=True), arch)
    kernels = tmp_path / "kernels"
    write(kernels, f"{arch.name}.models", [(INDEX_TITLE, index), (CODE_TITLE, code)])
    central = LocalStore(tmp_path / "central/store")
    write_engine(central.root, kernels, "tiny", "bf16", arch.name)
    with (
        EmbeddedRedis(tmp_path / "redis") as redis,
        CompilerDaemon(redis.url, tmp_path / "central") as compiler,
    ):
        tuned = tmp_path / "tuned"
        command = [sys.executable, "-m", "millrace.cli", "tune", "tiny", "--quant", "bf16"]
        command += ["--store", str(tuned), "--compiler", compiler.address, "--json"]
        said = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        assert said["published"] == ["local", "remote"]
        with _runtime(tmp_path / "later", compiler.address) as runtime:
            applied = runtime.wait_for("tuning_applied")
            assert _generated(runtime.address) == 8
    (engine,) = central.list()
    (blob,) = engine.tunings
    record = record_from_json(
        central.read_all(blob.digest), gpu=blob.title, engine=engine.manifest.digest
    )
    measured = {site_of(row) for row in record.sites}
    assert measured == {site for regime in REGIMES for site in sites(graph, arch, regime)}
    changed = [row for row in record.sites if row.choice != row.built_in]
    assert (applied["gpu"], applied["sites"]) == (torch.cuda.get_device_name(), len(changed))


@contextmanager
def _runtime(store: Path, compiler: str) -> Iterator[DaemonProcess]:
    """A runtime with an empty store, which serves."""
    flags = ("--listen", "127.0.0.1:0", "--metrics-listen", "", "--store", str(store))
    flags = (*flags, "--compiler", compiler, "--model", "tiny", "--quant", "bf16")
    with DaemonProcess("runtime_service", *flags, "--kv-bytes", str(1 << 24)) as runtime:
        runtime.wait_for("engine_loaded")
        yield runtime


def _generated(address: str) -> int:
    """Tokens that came of a generation of 8."""
    stop = pb.StopConditions(max_new_tokens=8, ignore_end_tokens=True)
    start = pb.StartGeneration(token_ids=pb.TokenIds(ids=range(5, 14)), stop=stop)
    with grpc.insecure_channel(address) as channel:
        stub = runtime_pb2_grpc.RuntimeServiceStub(channel)
        responses = stub.GenerateStream(pb.GenerateStreamRequest(start=start))
        return sum(len(event.tokens.token_ids) for r in responses for event in r.events)
