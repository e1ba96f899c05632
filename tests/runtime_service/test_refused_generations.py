"""A start that makes no sense is one clear error, and disturbs nobody."""

from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_status import rpc_status
from millrace.runtime.v1 import runtime_pb2 as pb

from shared.errors import from_status, reason_of
from tests.runtime_service.daemon import running_daemon, start_of
from tests.runtime_service.echo_engine import VOCAB_SIZE

NAN = float("nan")


BAD_STARTS: dict[str, tuple[str, Any]] = {
    "no prompt": ("start.prompt", pb.StartGeneration()),
    "empty ids": ("start.token_ids.ids", pb.StartGeneration(token_ids=pb.TokenIds())),
    "empty text": ("start.text", pb.StartGeneration(text="")),
    "empty chat": ("start.chat.messages", pb.StartGeneration(chat=pb.Chat())),
    "token id": ("start.token_ids.ids", start_of([1, VOCAB_SIZE])),
    "resumed id": ("start.resumed_token_ids", start_of([1], resumed_token_ids=[VOCAB_SIZE])),
    "resumed n": (
        "start.resumed_token_ids",
        start_of([1], resumed_token_ids=[1], sampling=pb.SamplingParams(n=2)),
    ),
    "stop id": ("start.stop.token_ids", start_of([1], token_ids=[VOCAB_SIZE])),
    "stop ids": ("start.stop.token_ids", start_of([1], token_ids=range(257))),
    "biases": (
        "start.sampling.logit_bias",
        start_of([1], sampling=pb.SamplingParams(logit_bias=dict.fromkeys(range(1025), 1.0))),
    ),
    "stop string": ("start.stop.strings", start_of([1], strings=[""])),
    "long stop string": ("start.stop.strings", start_of([1], strings=["é" * 129])),
    "stop strings": ("start.stop.strings", start_of([1], strings=["x"] * 17)),
    "max tokens": ("start.stop.max_new_tokens", start_of([1], max_new_tokens=-1)),
    "min tokens": ("start.stop.min_new_tokens", start_of([1], min_new_tokens=-1)),
    "min over max": (
        "start.stop.min_new_tokens",
        start_of([1], min_new_tokens=3, max_new_tokens=2),
    ),
    "priority": ("start.priority", start_of([1], priority=101)),
    "credit": ("start.credit_tokens", start_of([1], credit_tokens=-1)),
    "timeout": ("start.timeout", start_of([1], timeout={"seconds": 0})),
    **{
        f"{name} {value}": (
            f"start.sampling.{name}",
            start_of([1], sampling=pb.SamplingParams(**{name: value})),
        )
        for name, value in (
            ("temperature", NAN),
            ("temperature", -0.1),
            ("temperature", 101.0),
            ("top_k", -1),
            ("top_p", 0.0),
            ("top_p", 1.5),
            ("top_p", NAN),
            ("min_p", 1.1),
            ("min_p", NAN),
            ("repetition_penalty", 0.0),
            ("repetition_penalty", 0.009),
            ("repetition_penalty", 101.0),
            ("repetition_penalty", NAN),
            ("repetition_penalty", float("inf")),
            ("presence_penalty", 2.1),
            ("frequency_penalty", NAN),
            ("logit_bias", {1: NAN}),
            ("logit_bias", {VOCAB_SIZE: 1.0}),
            ("n", 65),
            ("n", -1),
            ("top_logprobs", 21),
        )
    },
}


async def test_bad_start_is_one_clear_error_and_disturbs_nobody(tmp_path: Path) -> None:
    """Every row of BAD_STARTS ends with INVALID_FIELD naming its field; a neighbour finishes."""
    async with running_daemon(tmp_path) as daemon:
        call = daemon.call()
        await call.start("neighbour", [40, 41], max_new_tokens=50)
        for name, (_, start) in BAD_STARTS.items():
            start = pb.StartGeneration.FromString(start.SerializeToString())
            start.request_id = name
            await call.send(start=start)
        seen = await call.finish()
    assert seen["neighbour"].token_ids[0] == [40, 41] * 25
    found = {name: s for name, s in seen.items() if name != "neighbour"}
    assert {name: reason_of(s.error) for name, s in found.items()} == dict.fromkeys(
        BAD_STARTS, "INVALID_FIELD"
    )
    assert {name: from_status(s.error).fields["field"] for name, s in found.items()} == {
        name: field for name, (field, _) in BAD_STARTS.items()
    }


async def test_prompt_beyond_the_context_is_refused(tmp_path: Path) -> None:
    async with running_daemon(tmp_path, max_sequence_tokens=64) as daemon:
        call = daemon.call()
        await call.start("fits", [40] * 63)
        await call.start("exact", [40] * 64)
        await call.start("text", "x" * 100)
        seen = await call.finish()
    assert seen["fits"].reason == "LENGTH"
    assert seen["fits"].token_ids[0] == [40]
    assert reason_of(seen["exact"].error) == reason_of(seen["text"].error) == "PROMPT_TOO_LONG"
    assert from_status(seen["text"].error).fields["prompt_tokens"] == "100"


@pytest.mark.parametrize("request_id", ["", "x" * 257], ids=["empty", "long"])
async def test_bad_request_id_is_refused(tmp_path: Path, request_id: str) -> None:
    async with running_daemon(tmp_path) as daemon:
        call = daemon.call()
        await call.start(request_id, [40])
        seen = await call.finish()
    assert from_status(seen[request_id].error).fields["field"] == "start.request_id"


async def test_duplicate_request_id_is_refused_and_the_first_one_finishes(tmp_path: Path) -> None:
    async with running_daemon(tmp_path, step_s=0.005) as daemon:
        raw = daemon.stub.Generate()
        for _ in range(2):
            start = start_of([40], request_id="a", max_new_tokens=30, credit_tokens=4)
            await raw.write(pb.GenerateRequest(start=start))
        credit = pb.AddCredit(request_id="a", tokens=100)
        await raw.write(pb.GenerateRequest(credit=credit))
        await raw.done_writing()
        events = [event async for message in raw for event in message.events]
    errors = [event.error for event in events if event.HasField("error")]
    assert [from_status(error).fields["field"] for error in errors] == ["start.request_id"]
    assert sum(len(event.tokens.token_ids) for event in events) == 30
    assert events[-1].HasField("finished")


async def test_request_id_is_free_again_once_it_has_ended(tmp_path: Path) -> None:
    async with running_daemon(tmp_path) as daemon:
        call = daemon.call()
        for _ in range(2):
            await call.start("a", [40], max_new_tokens=3)
            seen = await call.read_to_end("a")
            assert seen.token_ids[0] == [40] * 3
            call.seen.clear()


async def test_unknown_field_is_refused_by_number(tmp_path: Path) -> None:
    """A field that is silently ignored would change what a client gets without a word."""
    start = start_of([40], request_id="a", max_new_tokens=2)
    start.sampling.MergeFromString(b"\xf8\x07\x01")  # field 127
    async with running_daemon(tmp_path) as daemon:
        call = daemon.call()
        await call.start("b", [40], max_new_tokens=2)
        await call.send(start=start)
        seen = await call.finish()
    assert reason_of(seen["a"].error) == "INVALID_FIELD"
    assert "SamplingParams#127" in seen["a"].error.message
    assert seen["b"].reason == "LENGTH"


async def test_command_without_content_is_told_and_disturbs_nobody(tmp_path: Path) -> None:
    async with running_daemon(tmp_path) as daemon:
        call = daemon.call()
        await call.start("a", [40], max_new_tokens=20)
        await call.send()
        seen = await call.finish()
    assert reason_of(seen[""].error) == "INVALID_FIELD"
    assert seen["a"].reason == "LENGTH"


async def test_nonsense_about_a_generation_ends_that_one(tmp_path: Path) -> None:
    async with running_daemon(tmp_path) as daemon:
        call = daemon.call()
        for name in ("a", "b", "c"):
            await call.start(name, [40], max_new_tokens=3, credit_tokens=0)
        await call.send(update=pb.UpdateGeneration(request_id="a", priority=1000))
        await call.send(credit=pb.AddCredit(request_id="b", tokens=0))
        await call.send(credit=pb.AddCredit(request_id="c", tokens=9))
        seen = await call.finish()
    assert from_status(seen["a"].error).fields["field"] == "update.priority"
    assert from_status(seen["b"].error).fields["field"] == "credit.tokens"
    assert seen["c"].reason == "LENGTH"


async def test_message_over_the_limit_ends_its_call_alone(tmp_path: Path) -> None:
    async with running_daemon(tmp_path, max_message_bytes=1 << 16, step_s=0.005) as daemon:
        other, call = daemon.call(), daemon.call()
        await other.start("a", [40], max_new_tokens=60)
        await call.start("b", "x" * (1 << 17))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.finish()
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await other.finish())["a"].reason == "LENGTH"


async def test_stream_fails_as_a_call(tmp_path: Path) -> None:
    async with running_daemon(tmp_path) as daemon:
        request = pb.GenerateStreamRequest(start=start_of([VOCAB_SIZE]))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in daemon.stub.GenerateStream(request):
                pass
    status = rpc_status.from_call(caught.value)
    assert status is not None
    assert reason_of(status) == "INVALID_FIELD"


async def test_start_of_another_model_is_refused(tmp_path: Path) -> None:
    async with running_daemon(tmp_path) as daemon:
        served = daemon.runtime.served
        assert served is not None
        call = daemon.call()
        for name in ("echo", served.engine.name, served.engine.key.model_digest):
            await call.start(name, [40], max_new_tokens=1, model=name)
        await call.start("text", "hello", max_new_tokens=1, model="other")
        await call.start("ids", [40], max_new_tokens=1, model="other")
        seen = await call.finish()
    for name in ("text", "ids"):
        refused = from_status(seen.pop(name).error)
        assert refused.reason == "MODEL_NOT_SERVED"
        assert refused.fields["known"] == "echo"
    assert {one.reason for one in seen.values()} == {"LENGTH"}
