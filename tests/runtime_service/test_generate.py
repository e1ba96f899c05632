"""Generate over real gRPC and a real engine process that repeats its prompt."""

import gc
import logging
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import structlog
from millrace.runtime.v1 import runtime_pb2 as pb

from compiler_service.checkpoints.byte_tokenizer import IM_END_ID
from tests.runtime_service.daemon import TOKENIZER, running_daemon, start_of, until


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


async def test_stream_of_one_generation(tmp_path: Path) -> None:
    async with running_daemon(tmp_path) as daemon:
        request = pb.GenerateStreamRequest(start=start_of([40, 41], max_new_tokens=6))
        events = [e async for m in daemon.stub.GenerateStream(request) for e in m.events]
        assert [t for e in events for t in e.tokens.token_ids] == [40, 41] * 3
        assert events[0].HasField("started")
        assert events[-1].HasField("finished")


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
