"""The SDK's builds, engines and blobs against a scripted daemon."""

from itertools import islice

import millrace
import pytest
from millrace.compiler.v1 import compiler_pb2
from millrace.retries import Retries
from millrace.runtime.v1 import runtime_pb2

from shared.errors import InvalidModel, to_status
from tests.clients.scripted_daemon import (
    Script,
    ScriptedDaemon,
    a_build,
    an_engine,
    an_operation,
    running,
    succeeded,
)


def test_build_is_watched_to_its_end(client: millrace.Client, script: Script) -> None:
    script.changes = [running(0.1, "import"), running(0.6, "quantize"), succeeded()]
    seen: list[float] = []
    operation = client.build(
        "sample:tiny", ["cpu"], "int8",
        on_change=lambda change: seen.append(round(change.builds[0].progress.fraction, 3)),
    )  # fmt: skip
    assert seen == [0.1, 0.6, 0.0]
    assert operation.builds[0].state == compiler_pb2.BUILD_STATE_SUCCEEDED
    assert script.asked[0].quant.scheme == "int8"


def test_broken_watch_is_taken_up_again(client: millrace.Client, script: Script) -> None:
    script.changes = [running(0.1, "import"), running(0.6, "quantize"), succeeded()]
    script.breaks = [1]
    states = [operation.builds[0].state for operation in client.watch_operation("operations/1")]
    assert states[-1] == compiler_pb2.BUILD_STATE_SUCCEEDED
    assert len(script.asked) == 2


def test_build_that_nobody_knows_any_more_is_asked_for_again(
    client: millrace.Client, script: Script
) -> None:
    """Redis came back empty. Who only has the operation's name is told so."""
    script.changes = [running(0.1, "import"), succeeded()]
    script.forgets = 2
    assert client.build("sample:tiny").builds[0].state == compiler_pb2.BUILD_STATE_SUCCEEDED
    kinds = [type(request).__name__ for request in script.asked]
    assert kinds == ["BuildEngineRequest", "WatchOperationRequest"] * 3
    script.forgets = 1
    with pytest.raises(millrace.MillraceError, match="ask for it again") as caught:
        list(client.watch_operation("operations/1"))
    assert caught.value.reason == "BUILD_NOT_FOUND"


def test_build_that_is_forgotten_again_and_again_is_an_error(
    client: millrace.Client, script: Script
) -> None:
    script.forgets = 100
    with pytest.raises(millrace.MillraceError) as caught:
        client.build("sample:tiny")
    assert caught.value.reason == "BUILD_NOT_FOUND"
    assert script.forgets == 100 - Retries().max_attempts


async def test_async_build_that_nobody_knows_any_more_is_asked_for_again(script: Script) -> None:
    script.forgets = 1
    with ScriptedDaemon(script) as daemon:
        async with millrace.AsyncClient(compiler=daemon.address) as client:
            operation = await client.build("sample:tiny")
    assert operation.builds[0].state == compiler_pb2.BUILD_STATE_SUCCEEDED
    assert len(script.asked) == 4


def test_failed_build_is_raised(client: millrace.Client, script: Script) -> None:
    error = to_status(InvalidModel(problem="a shard is missing"))
    script.changes = [an_operation(a_build(compiler_pb2.BUILD_STATE_FAILED, error=error))]
    with pytest.raises(millrace.MillraceError, match="a shard is missing") as caught:
        client.build("sample:tiny")
    assert caught.value.reason == "INVALID_MODEL"


def test_cancelled_build_is_raised(client: millrace.Client, script: Script) -> None:
    script.changes = [an_operation(a_build(compiler_pb2.BUILD_STATE_CANCELLED))]
    with pytest.raises(millrace.MillraceError, match="was cancelled"):
        client.build("sample:tiny")


def test_lists_turn_every_page(client: millrace.Client, script: Script) -> None:
    script.builds = [a_build(compiler_pb2.BUILD_STATE_QUEUED, attempt=i) for i in range(5)]
    assert [build.attempt for build in client.list_builds()] == [0, 1, 2, 3, 4]


def test_build_is_read_by_its_name(client: millrace.Client, script: Script) -> None:
    script.builds = [a_build(compiler_pb2.BUILD_STATE_RUNNING)]
    assert client.get_build(script.builds[0].name) == script.builds[0]
    with pytest.raises(millrace.MillraceError) as caught:
        client.get_build("builds/none")
    assert caught.value.reason == "BUILD_NOT_FOUND"


def test_engines_are_deleted_and_unloaded(client: millrace.Client, script: Script) -> None:
    client.delete_engine("engines/old")
    client.unload_engine()
    deleted, unloaded = script.asked
    assert deleted == compiler_pb2.DeleteEngineRequest(name="engines/old")
    assert unloaded == runtime_pb2.UnloadEngineRequest()


def test_blob_is_verified(client: millrace.Client, script: Script) -> None:
    engine = an_engine(script.blobs, {"graph.json": {"nodes": ["x"] * 100}})
    digest = engine.layers[0].digest
    assert len(client.read_blob(digest)) == engine.layers[0].size_bytes
    script.blobs[digest] += b" "
    with pytest.raises(millrace.MillraceError) as caught:
        client.read_blob(digest)
    assert caught.value.reason == "DIGEST_MISMATCH"


def test_watch_that_ends_early_is_not_begun_again_for_ever(
    daemon: ScriptedDaemon, script: Script
) -> None:
    script.changes = [running(0.1, "import")]
    client = millrace.Client(daemon.address, retries=Retries(max_attempts=3, first_delay_s=0.001))
    with pytest.raises(millrace.MillraceError) as caught:
        list(islice(client.watch_operation("operations/0001"), 30))
    assert caught.value.reason == "CALL_ENDED"
