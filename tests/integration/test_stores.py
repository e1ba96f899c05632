"""Engines that live in a bucket or a registry: built by one daemon, pulled and served by others."""

from pathlib import Path
from typing import Any

import grpc
import pytest
from millrace.artifact.v1 import artifact_pb2, artifact_pb2_grpc
from millrace.compiler.v1 import compiler_pb2
from millrace.runtime.v1 import runtime_pb2 as pb
from millrace.runtime.v1 import runtime_pb2_grpc

from shared.store import LocalStore
from tests.checkpoints import write_checkpoint
from tests.integration.compiler_daemon import CompilerDaemon, client_of
from tests.integration.daemon_process import DaemonProcess
from tests.integration.test_main_job import generate, greedy, serving, start, token_ids
from tests.shared.remote_stores import opened
from tests.shared.store_servers import S3Server

pytestmark = pytest.mark.redis


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", "llama")


def runtime_of(url: str, folder: Path, *flags: str) -> DaemonProcess:
    """A runtime daemon that serves `tiny` from the store at `url`, and builds nothing."""
    return DaemonProcess(
        "runtime_service",
        "--listen", "127.0.0.1:0", "--metrics-listen", "", "--store", url,
        "--cache", str(folder), "--model", "tiny", "--quant", "fp32", "--arch", "cpu",
        "--kv-bytes", str(8 << 20), *flags,
    )  # fmt: skip


async def tokens_of(runtime: DaemonProcess) -> list[int]:
    """What it generates for the test's prompt."""
    async with grpc.aio.insecure_channel(runtime.address) as channel:
        await serving(channel)
        stub: Any = runtime_pb2_grpc.RuntimeServiceStub(channel)
        events = await generate(stub, [start("a")])
    assert events["a"][-1].finished.samples[0].reason == pb.FINISH_REASON_LENGTH
    return token_ids(events["a"])


async def test_engine_is_built_into_a_store_elsewhere_and_served_from_it(
    redis_url: str, tmp_path: Path, checkpoint: Path, url: str
) -> None:
    """No daemon shares a folder with another one; secrets of the store are in no log."""
    expected = greedy(checkpoint)
    with CompilerDaemon(redis_url, tmp_path / "one", "--store", url) as compiler:
        async with client_of(compiler) as client:
            request = compiler_pb2.BuildEngineRequest(
                model_uri=str(checkpoint), archs=["cpu"], model="tiny"
            )
            request.quant.scheme = "fp32"
            asked = (await client.stub.BuildEngine(request, timeout=60)).operation
            operation = await client.end_of(asked)
            (build,) = operation.builds
            assert build.state == compiler_pb2.BUILD_STATE_SUCCEEDED, build.error
            assert "push" in [timing.stage for timing in build.stage_timings]
            again = await client.end_of((await client.stub.BuildEngine(request)).operation)
            assert [each.cached for each in again.builds] == [True]
            listed = await client.stub.ListEngines(compiler_pb2.ListEnginesRequest())
            (engine,) = listed.engines
            assert engine.name == build.name.replace("builds/", "engines/")
            # A runtime may still ask the compile daemon, which passes on what the store has.
            artifacts: Any = artifact_pb2_grpc.ArtifactServiceStub(client.channel)
            found = await artifacts.FindEngine(artifact_pb2.FindEngineRequest(name=engine.name))
            read = artifact_pb2.ReadBlobRequest(digest=found.engine.layers[0].digest)
            graph = b"".join([piece.data async for piece in artifacts.ReadBlob(read)])
            assert graph.startswith(b"{")
        said = str(compiler.lines)
    assert [each.name for each in opened(url).list()] == [engine.name]
    with runtime_of(url, tmp_path / "two") as runtime:
        assert await tokens_of(runtime) == expected
        said += str(runtime.lines)
    assert LocalStore(tmp_path / "two").get(engine.name).name == engine.name
    assert S3Server("").secret_key not in said


async def test_runtime_may_have_its_cache_where_a_compile_daemon_has_one(
    redis_url: str, tmp_path: Path, checkpoint: Path, oci_url: str
) -> None:
    """By default both are `~/.millrace/cache`."""
    with CompilerDaemon(redis_url, tmp_path, "--store", oci_url) as compiler:
        async with client_of(compiler) as client:
            await client.built(checkpoint, "cpu")
        (engine,) = opened(oci_url).list()
        opened(oci_url).add_model_name(engine, "tiny")
        with runtime_of(oci_url, tmp_path / "cache") as runtime:
            assert await tokens_of(runtime) == greedy(checkpoint)


async def test_runtime_whose_cache_is_too_small_says_so_in_a_line(
    redis_url: str, tmp_path: Path, checkpoint: Path, oci_url: str
) -> None:
    with CompilerDaemon(redis_url, tmp_path / "one", "--store", oci_url) as compiler:
        async with client_of(compiler) as client:
            await client.built(checkpoint, "cpu")
    (engine,) = opened(oci_url).list()
    opened(oci_url).add_model_name(engine, "tiny")
    with runtime_of(oci_url, tmp_path / "two", "--cache-bytes", "1000") as runtime:
        assert runtime.process.wait(60) == 1
        runtime._reader.join()
        assert "raise --cache-bytes" in str(runtime.lines[-1])


def test_compile_daemon_without_its_bucket_stops_with_a_line(
    redis_url: str, tmp_path: Path, aws: S3Server
) -> None:
    with pytest.raises(AssertionError, match=r"s3://no-such-bucket does not exist"):
        CompilerDaemon(redis_url, tmp_path, "--store", "s3://no-such-bucket")
