"""Cancel, update, credit, deadlines and clients that vanish: what becomes of a generation that runs."""

from pathlib import Path

import grpc
import pytest
from millrace.runtime.v1 import runtime_pb2 as pb

from shared.errors import reason_of
from tests.runtime_service.daemon import ENDLESS, ENDLESS_TOKENS, running_daemon, start_of, until


async def test_cancel_ends_one_generation(tmp_path: Path) -> None:
    async with running_daemon(tmp_path, step_s=0.005, **ENDLESS) as daemon:
        call = daemon.call()
        await call.start("a", [40], max_new_tokens=ENDLESS_TOKENS)
        await call.start("b", [41], max_new_tokens=20)
        await call.read_until(lambda: "a" in call.seen and bool(call.seen["a"].chunks))
        await call.send(cancel=pb.CancelGeneration(request_id="a"))
        await call.send(cancel=pb.CancelGeneration(request_id="nobody"))
        seen = await call.finish()
        await daemon.freed()
    assert seen["a"].reason == "CANCELLED"
    assert seen["a"].finished is not None
    assert seen["a"].finished.usage.generated_tokens == len(seen["a"].token_ids[0])
    assert seen["b"].reason == "LENGTH"


async def test_cancel_right_after_start_is_obeyed(tmp_path: Path) -> None:
    """The start may still be on its way through the tokenizer."""
    async with running_daemon(tmp_path, step_s=0.005, **ENDLESS) as daemon:
        call = daemon.call()
        await call.start("a", "hello " * 50, max_new_tokens=ENDLESS_TOKENS)
        await call.send(cancel=pb.CancelGeneration(request_id="a"))
        seen = await call.finish()
    assert seen["a"].reason == "CANCELLED"


async def test_update_changes_the_limit(tmp_path: Path) -> None:
    async with running_daemon(tmp_path) as daemon:
        call = daemon.call()
        await call.start("a", [40], max_new_tokens=4, credit_tokens=2)
        await call.start("below", [40], max_new_tokens=100, credit_tokens=5)
        await call.read_until(lambda: (call.num_tokens("a"), call.num_tokens("below")) == (2, 5))
        await call.send(update=pb.UpdateGeneration(request_id="a", max_new_tokens=7, priority=3))
        await call.send(update=pb.UpdateGeneration(request_id="below", max_new_tokens=3))
        await call.send(credit=pb.AddCredit(request_id="a", tokens=50))
        seen = await call.finish()
    assert len(seen["a"].token_ids[0]) == 7
    assert seen["below"].reason == "LENGTH"


async def test_generation_waits_for_credit(tmp_path: Path) -> None:
    async with running_daemon(tmp_path) as daemon:
        client, call = daemon.client, daemon.call()
        await call.start("a", [40], max_new_tokens=10, credit_tokens=4)
        await call.read_until(lambda: call.num_tokens("a") == 4)
        await until(lambda: not client._is_working())
        # An engine that may not go on does not hang, however little patience its watchdog has.
        patience_s, client._step_timeout_s = client._step_timeout_s, 0.0
        for _ in range(3):
            last_look_s = client._last_sign_s
            await until(lambda last_s=last_look_s: client._last_sign_s > last_s or client.is_over)  # type: ignore[misc]
        client._step_timeout_s = patience_s
        assert len(call.seen["a"].token_ids[0]) == 4
        await call.send(credit=pb.AddCredit(request_id="a", tokens=6))
        seen = await call.finish()
    assert seen["a"].reason == "LENGTH"
    assert len(seen["a"].token_ids[0]) == 10


async def test_timeout_ends_one_generation(tmp_path: Path) -> None:
    async with running_daemon(tmp_path, step_s=0.01, **ENDLESS) as daemon:
        call = daemon.call()
        some_s = {"nanos": 150_000_000}
        await call.start("a", [40], max_new_tokens=ENDLESS_TOKENS, timeout=some_s)
        await call.start("credit", [40], credit_tokens=0, timeout=some_s)
        await call.start("b", [41], max_new_tokens=40)
        seen = await call.finish()
        await daemon.freed()
    assert reason_of(seen["a"].error) == reason_of(seen["credit"].error) == "DEADLINE_EXCEEDED"
    assert seen["b"].reason == "LENGTH"


async def test_call_deadline_ends_its_generations(tmp_path: Path) -> None:
    async with running_daemon(tmp_path, step_s=0.01, **ENDLESS) as daemon:
        start = start_of([40], request_id="a", max_new_tokens=ENDLESS_TOKENS)

        async def ask_and_read() -> None:
            raw = daemon.stub.Generate(timeout=0.3)
            await raw.write(pb.GenerateRequest(start=start))
            async for _ in raw:
                pass

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask_and_read()
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        await daemon.freed()


async def test_vanished_client_leaves_nothing_running(tmp_path: Path) -> None:
    async with running_daemon(tmp_path, step_s=0.005, **ENDLESS) as daemon:
        call = daemon.call()
        for number in range(20):
            await call.start(str(number), [40, 41], max_new_tokens=ENDLESS_TOKENS)
        await call.read_until(lambda: all(call.num_tokens(str(n)) for n in range(20)))
        call.raw.cancel()

        async def load() -> pb.RuntimeLoad:
            return (await daemon.stub.GetStatus(pb.GetStatusRequest())).load

        await daemon.freed()
        now = await load()
        all_blocks = ENDLESS["num_blocks"]
        assert (now.free_blocks, now.running_sequences, now.waiting_sequences) == (all_blocks, 0, 0)
        assert now.waiting_tokens == 0


async def test_cancelled_stream_leaves_nothing_running(tmp_path: Path) -> None:
    async with running_daemon(tmp_path, step_s=0.005, **ENDLESS) as daemon:
        request = pb.GenerateStreamRequest(start=start_of([40], max_new_tokens=ENDLESS_TOKENS))
        stream = daemon.stub.GenerateStream(request)
        await stream.read()
        stream.cancel()
        await daemon.freed()
