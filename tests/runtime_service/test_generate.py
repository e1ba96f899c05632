"""Generate over real gRPC and a real engine process that repeats its prompt."""

import gc
import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import structlog
from grpc_status import rpc_status
from millrace.runtime.v1 import runtime_pb2 as pb

from compiler_service.checkpoints.byte_tokenizer import IM_END_ID
from shared.errors import from_status, reason_of
from tests.runtime_service.daemon import (
    ENDLESS,
    ENDLESS_TOKENS,
    TOKENIZER,
    running_daemon,
    start_of,
    until,
)
from tests.runtime_service.echo_engine import VOCAB_SIZE

NAN = float("nan")


async def test_text_goes_in_and_comes_out(tmp_path: Path) -> None:
    text = "hello, wörld 🙂"
    num_tokens = len(TOKENIZER.encode(text).ids)
    async with running_daemon(tmp_path) as daemon:
        call = daemon.call()
        await call.start("a", text, max_new_tokens=num_tokens)
        seen = (await call.finish())["a"]
    assert seen.text[0] == text
    assert seen.reason == "LENGTH"
    assert seen.finished is not None
    assert seen.finished.usage.prompt_tokens == seen.prompt_tokens == num_tokens
    assert seen.finished.usage.generated_tokens == num_tokens
    assert seen.finished.timings.total.ToNanoseconds() > 0
    assert seen.seed is not None


async def test_chat_is_rendered_with_the_template(tmp_path: Path) -> None:
    rendered = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    async with running_daemon(tmp_path) as daemon:
        start = pb.StartGeneration(
            request_id="a",
            chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")]),
            stop=pb.StopConditions(max_new_tokens=100, ignore_end_tokens=True),
        )
        call = daemon.call()
        await call.send(start=start)
        seen = (await call.finish())["a"]
    expected = TOKENIZER.encode(rendered).ids
    assert seen.token_ids[0][: len(expected)] == expected
    assert seen.text[0].startswith("user\nhi\nassistant\nuser\n")


async def test_end_token_ends_and_is_not_text(tmp_path: Path) -> None:
    async with running_daemon(tmp_path) as daemon:
        call = daemon.call()
        await call.start("end", [50, 51, 2], max_new_tokens=9)
        await call.start("own", [50, 51, 52], max_new_tokens=9, token_ids=[52])
        await call.start("ignored", [50, 51, 2], max_new_tokens=9, ignore_end_tokens=True)
        seen = await call.finish()
    assert seen["end"].token_ids[0] == [50, 51, 2]
    assert seen["end"].reason == "STOP_TOKEN"
    assert seen["end"].finished is not None
    assert seen["end"].finished.samples[0].stop_token_id == 2
    assert seen["own"].text[0] == TOKENIZER.decode([50, 51])
    assert seen["ignored"].token_ids[0] == [50, 51, 2] * 3


async def test_stop_string_ends_and_never_leaks(tmp_path: Path) -> None:
    async with running_daemon(tmp_path) as daemon:
        call = daemon.call()
        await call.start("a", "hello STOP there", max_new_tokens=100, strings=["STOP", "STOW"])
        await call.start("late", "ab STOP", max_new_tokens=100, strings=["STOP"], min_new_tokens=12)
        seen = await call.finish()
        await daemon.freed()
    for chunk in seen["a"].chunks:
        assert "S" not in chunk.text
    assert seen["a"].text[0] == "hello "
    assert seen["a"].finished is not None
    assert seen["a"].finished.samples[0].stop_string == "STOP"
    assert TOKENIZER.decode(seen["a"].token_ids[0]) == "hello STOP"
    assert seen["a"].finished.usage.generated_tokens == len(seen["a"].token_ids[0])
    assert seen["late"].text[0] == "ab STOPab "


async def test_samples_end_one_by_one(tmp_path: Path) -> None:
    async with running_daemon(tmp_path) as daemon:
        call = daemon.call()
        start = start_of([40, 41, 42], request_id="a", max_new_tokens=5)
        start.sampling.n = 3
        await call.send(start=start)
        seen = (await call.finish())["a"]
    assert seen.token_ids == {i: [40, 41, 42, 40, 41] for i in range(3)}
    assert seen.finished is not None
    assert [s.sample_index for s in seen.finished.samples] == [0, 1, 2]
    assert seen.finished.usage.generated_tokens == 15


async def test_logprobs_come_when_asked_for(tmp_path: Path) -> None:
    async with running_daemon(tmp_path) as daemon:
        call = daemon.call()
        for name, sampling in (
            ("none", pb.SamplingParams()),
            ("tokens", pb.SamplingParams(top_logprobs=1)),
            ("prompt", pb.SamplingParams(prompt_logprobs=True)),
        ):
            start = start_of([40, 41, 42], request_id=name, max_new_tokens=2)
            start.sampling.CopyFrom(sampling)
            await call.send(start=start)
        seen = await call.finish()
    rows = {
        name: (
            [row.token_id for chunk in s.chunks for row in chunk.logprobs],
            [row.token_id for chunk in s.chunks for row in chunk.prompt_logprobs],
        )
        for name, s in seen.items()
    }
    assert rows["none"] == ([], [])
    assert rows["tokens"][0] == [40, 41]
    assert rows["prompt"] == ([], [41, 42])
    assert seen["tokens"].chunks[0].logprobs[0].top[0].logprob == -0.25


async def test_logprobs_spell_their_tokens(tmp_path: Path) -> None:
    """Bytes, since a token may be a part of a character; a special token has its name."""
    prompt = [*TOKENIZER.encode("Wölf").ids, IM_END_ID]
    async with running_daemon(tmp_path) as daemon:
        call = daemon.call()
        start = start_of(prompt, request_id="a", max_new_tokens=len(prompt))
        start.sampling.top_logprobs = 1
        start.stop.ignore_end_tokens = True
        await call.send(start=start)
        seen = (await call.finish())["a"]
    rows = [row for chunk in seen.chunks for row in chunk.logprobs]
    expected = [b"W", b"\xc3", b"\xb6", b"l", b"f", b"<|im_end|>"]
    assert [row.token for row in rows] == expected
    assert [top.token for row in rows for top in row.top] == expected


async def test_seed_is_kept_or_drawn(tmp_path: Path) -> None:
    async with running_daemon(tmp_path) as daemon:
        call = daemon.call()
        start = start_of([40], request_id="given", max_new_tokens=1)
        start.sampling.seed = 2**64 - 1
        await call.send(start=start)
        await call.start("one", [40], max_new_tokens=1)
        await call.start("two", [40], max_new_tokens=1)
        seen = await call.finish()
    assert seen["given"].seed == 2**64 - 1
    assert seen["one"].seed != seen["two"].seed


async def test_resumed_generation_goes_on_and_counts_what_was_there(tmp_path: Path) -> None:
    async with running_daemon(tmp_path) as daemon:
        call = daemon.call()
        prompt = [40, 41, 42, 2]
        await call.start("on", prompt, resumed_token_ids=[40, 41], max_new_tokens=9)
        await call.start("length", prompt, resumed_token_ids=[40, 41], max_new_tokens=2)
        await call.start("end", prompt, resumed_token_ids=[40, 2], max_new_tokens=9)
        await call.start("string", "ab", resumed_token_ids=[68, 69], strings=["ab"])
        seen = await call.finish()
    assert seen["on"].token_ids[0] == [42, 2]
    assert seen["on"].reason == "STOP_TOKEN"
    assert {name: seen[name].reason for name in ("length", "end", "string")} == {
        "length": "LENGTH",
        "end": "STOP_TOKEN",
        "string": "STOP_STRING",
    }
    assert not seen["end"].chunks


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


async def test_two_hundred_generations_share_messages(tmp_path: Path) -> None:
    """One message carries what all generations of the call gained in a step."""
    async with running_daemon(tmp_path, max_sequences=256, num_blocks=2048, step_s=0.02) as daemon:
        call = daemon.call()
        for number in range(200):
            await call.start(str(number), [number + 3, 40], max_new_tokens=40)
        seen = await call.finish()
        assert daemon.client.stats is not None
        num_steps = daemon.client.stats.steps
    for number in range(200):
        assert seen[str(number)].token_ids[0] == [number + 3, 40] * 20
    with_tokens = [m for m in call.messages if any(e.HasField("tokens") for e in m.events)]
    assert len(with_tokens) <= num_steps


async def test_message_over_the_limit_ends_its_call_alone(tmp_path: Path) -> None:
    async with running_daemon(tmp_path, max_message_bytes=1 << 16, step_s=0.005) as daemon:
        other, call = daemon.call(), daemon.call()
        await other.start("a", [40], max_new_tokens=60)
        await call.start("b", "x" * (1 << 17))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.finish()
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await other.finish())["a"].reason == "LENGTH"


async def test_stream_of_one_generation(tmp_path: Path) -> None:
    async with running_daemon(tmp_path) as daemon:
        request = pb.GenerateStreamRequest(start=start_of([40, 41], max_new_tokens=6))
        events = [e async for m in daemon.stub.GenerateStream(request) for e in m.events]
        assert [t for e in events for t in e.tokens.token_ids] == [40, 41] * 3
        assert events[0].HasField("started")
        assert events[-1].HasField("finished")


async def test_stream_fails_as_a_call(tmp_path: Path) -> None:
    async with running_daemon(tmp_path) as daemon:
        request = pb.GenerateStreamRequest(start=start_of([VOCAB_SIZE]))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in daemon.stub.GenerateStream(request):
                pass
    status = rpc_status.from_call(caught.value)
    assert status is not None
    assert reason_of(status) == "INVALID_FIELD"


async def test_cancelled_stream_leaves_nothing_running(tmp_path: Path) -> None:
    async with running_daemon(tmp_path, step_s=0.005, **ENDLESS) as daemon:
        request = pb.GenerateStreamRequest(start=start_of([40], max_new_tokens=ENDLESS_TOKENS))
        stream = daemon.stub.GenerateStream(request)
        await stream.read()
        stream.cancel()
        await daemon.freed()


async def test_status_tells_engine_limits_and_load(tmp_path: Path) -> None:
    async with running_daemon(tmp_path) as daemon:
        status = await daemon.stub.GetStatus(pb.GetStatusRequest())
    assert status.state == pb.RUNTIME_STATE_SERVING
    assert status.engine.model == "echo"
    assert status.limits.max_sequence_tokens == 512
    assert status.limits.max_waiting_tokens == 4 * 256 * 16
    assert status.load.free_blocks == 256
    assert [phase.name for phase in status.startup] == [
        "find_engine",
        "start_process",
        "import",
        "load_weights",
        "warm_up",
    ]


async def test_prompts_and_tokens_are_not_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    structlog.configure(logger_factory=structlog.stdlib.LoggerFactory())
    try:
        with caplog.at_level(logging.DEBUG):
            async with running_daemon(tmp_path) as daemon:
                call = daemon.call()
                await call.start("a", "my secret wish", max_new_tokens=20, strings=["hush"])
                await call.finish()
    finally:
        structlog.reset_defaults()
    assert "generation_finished" in caplog.text
    assert "secret" not in caplog.text
    assert "hush" not in caplog.text


async def test_long_backlog_is_cut_into_messages(tmp_path: Path) -> None:
    """A reader that comes late gets everything, in messages that any client takes."""
    prompt = [3 + i % 200 for i in range(3000)]
    async with running_daemon(
        tmp_path, max_sequence_tokens=16_000, num_blocks=2048, max_step_tokens=4096
    ) as daemon:
        call = daemon.call()
        start = start_of(prompt, request_id="logprobs", max_new_tokens=3000)
        start.sampling.top_logprobs = 1
        start.sampling.prompt_logprobs = True
        await call.send(start=start)
        await call.start("plain", prompt, max_new_tokens=9000)
        await until(lambda: bool(daemon.runtime._calls))
        (slow,) = daemon.runtime._calls
        await until(lambda: not slow._running)
        seen = await call.finish()
    chunks = seen["logprobs"].chunks
    assert [row.token_id for c in chunks for row in c.logprobs] == prompt
    assert [row.token_id for c in chunks for row in c.prompt_logprobs] == prompt[1:]
    assert seen["plain"].token_ids[0] == prompt * 3
    assert seen["plain"].text[0] == TOKENIZER.decode(prompt * 3)
    assert max(message.ByteSize() for message in call.messages) < 256 << 10


async def test_many_tokens_leave_no_memory_behind(tmp_path: Path) -> None:
    """What is left behind grows with every 20,000 tokens: the front's memory is once what it was before them."""
    process = psutil.Process()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    try:
        async with running_daemon(tmp_path, num_blocks=2048) as daemon:
            readings = []
            for _ in range(4):
                call = daemon.call()
                for number in range(50):
                    await call.start(str(number), [40, 41, 42], max_new_tokens=400)
                await call.finish()
                del call
                gc.collect()
                readings.append(process.memory_info().rss)
            assert not daemon.runtime._calls
            assert not daemon.client._generations
    finally:
        structlog.reset_defaults()
    # By at least 50 bytes a token; what the allocator keeps for the next time comes and goes.
    assert min(after - before for before, after in pairwise(readings)) < 1 << 20


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
