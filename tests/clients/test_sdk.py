"""The SDK against a scripted daemon: streams, retries, prompts and options."""

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import millrace
import pytest
from millrace.async_stream import AsyncStream
from millrace.channels import is_serving
from millrace.errors import UNREACHABLE, from_status
from millrace.generation import start_generation
from millrace.retries import Retries
from millrace.runtime.v1 import runtime_pb2
from millrace.stream import Stream

from shared.errors import ERRORS, PromptTooLong, QueueFull, to_status
from tests.clients.scripted_daemon import TEXT, WORDS, Script, ScriptedDaemon

BUSY = {"waiting_tokens": 9, "max_waiting_tokens": 8}


def test_importing_the_sdk_imports_neither_torch_nor_the_daemons_code() -> None:
    code = (
        "import sys, millrace; [getattr(millrace, name) for name in millrace.__all__];"
        "bad = {'torch', 'shared', 'kernels', 'pydantic', 'redis', 'rich', 'typer'};"
        "sys.exit(', '.join(bad & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_chunks_arrive_in_order_and_add_up_to_the_result(client: millrace.Client) -> None:
    with client.generate("hello", seed=7) as stream:
        texts = [chunk.text for chunk in stream]
    assert texts == list(WORDS)
    assert stream.result.text == TEXT
    assert stream.result.samples[0].token_ids == (0, 1, 2, 3, 4)
    assert stream.result.samples[0].finish_reason == "length"
    assert stream.result.seed == 7
    assert stream.result.tokens_per_s == pytest.approx(20)


def test_samples_are_told_apart(client: millrace.Client) -> None:
    result = client.generate("hello", n=3, max_new_tokens=2).wait()
    assert [sample.text for sample in result.samples] == ["Once upon"] * 3


def test_result_is_refused_before_the_stream_was_read(client: millrace.Client) -> None:
    with client.generate("hello") as stream, pytest.raises(RuntimeError, match="read the stream"):
        _ = stream.result


def test_leaving_the_block_cancels(client: millrace.Client, script: Script) -> None:
    script.blocks_after = 1
    with client.generate("hello") as stream:
        assert next(iter(stream)).text == "Once"
    assert script.cancelled.wait(60)
    assert list(stream) == []


def test_another_thread_can_stop_a_stream(client: millrace.Client, script: Script) -> None:
    script.blocks_after = 1
    stream = client.generate("hello")
    chunks = iter(stream)
    next(chunks)
    threading.Timer(0.05, stream.close).start()
    assert list(chunks) == []
    assert script.cancelled.wait(60)


def test_refused_start_is_tried_again_after_the_daemons_delay(
    client: millrace.Client, script: Script
) -> None:
    script.failures = [QueueFull(retry_after_s=0.02, **BUSY), QueueFull(retry_after_s=0.02, **BUSY)]
    assert client.generate("hello").wait().text == TEXT
    assert len(script.asked) == 3


def test_retries_end(daemon: ScriptedDaemon, script: Script) -> None:
    script.failures = [QueueFull(retry_after_s=0.0, **BUSY) for _ in range(5)]
    client = millrace.Client(runtime=daemon.address, retries=Retries(max_attempts=2))
    with pytest.raises(millrace.MillraceError) as caught:
        client.generate("hello").wait()
    assert caught.value.reason == "QUEUE_FULL"
    assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert caught.value.metadata == {"waiting_tokens": "9", "max_waiting_tokens": "8"}
    assert len(script.asked) == 2


def test_what_retrying_cannot_help_is_raised_at_once(
    client: millrace.Client, script: Script
) -> None:
    script.failures = [PromptTooLong(prompt_tokens=9, max_sequence_tokens=8)]
    with pytest.raises(millrace.MillraceError, match="The prompt has 9 tokens") as caught:
        client.generate("hello").wait()
    assert (caught.value.reason, caught.value.retry_after_s) == ("PROMPT_TOO_LONG", None)
    assert len(script.asked) == 1


@pytest.mark.parametrize("row", ERRORS.values(), ids=ERRORS)
def test_every_error_row_arrives_whole(row: type) -> None:
    import string

    names = {name for _, name, _, _ in string.Formatter().parse(row.template) if name}
    error = row(**dict.fromkeys(names, "x"))
    seen = from_status(to_status(error))
    assert seen.reason == row.reason
    assert seen.code is row.code
    assert seen.message == str(error)
    assert dict(seen.metadata) == error.fields
    assert seen.retry_after_s == row.default_retry_after_s


def test_missing_daemon_is_told_in_one_sentence_with_the_fix() -> None:
    client = millrace.Client("127.0.0.1:1", retries=Retries(max_attempts=2, first_delay_s=0.01))
    with pytest.raises(millrace.MillraceError, match="millrace up") as caught:
        client.start_build("sample:tiny")
    assert caught.value.reason == UNREACHABLE


def test_health_is_asked_without_the_health_package(daemon: ScriptedDaemon) -> None:
    assert is_serving(daemon.address)
    with pytest.raises(millrace.MillraceError):
        is_serving("127.0.0.1:1", timeout_s=1)


def test_unknown_option_is_a_type_error(client: millrace.Client) -> None:
    with pytest.raises(TypeError, match="max_tokens"):
        client.generate("hello", max_tokens=3)  # type: ignore[call-arg]


def test_options_go_where_the_protocol_has_them() -> None:
    start = start_generation(
        [5, 6], "r1", max_new_tokens=4, stop=["\n"], stop_token_ids=[2], ignore_end_tokens=True,
        temperature=0.5, logit_bias={3: -100.0}, timeout_s=1.5, priority=3,
    )  # fmt: skip
    assert list(start.token_ids.ids) == [5, 6]
    assert (start.stop.max_new_tokens, list(start.stop.strings)) == (4, ["\n"])
    assert list(start.stop.token_ids) == [2]
    assert start.stop.ignore_end_tokens
    assert start.sampling.temperature == 0.5
    assert start.sampling.logit_bias[3] == -100.0
    assert not start.sampling.HasField("seed")
    assert start.timeout.ToMilliseconds() == 1500
    assert (start.request_id, start.priority) == ("r1", 3)


def test_one_stop_string_is_not_its_characters() -> None:
    assert list(start_generation("hello", stop="END").stop.strings) == ["END"]


def test_messages_become_a_chat() -> None:
    start = start_generation([{"role": "user", "content": "hi"}])
    assert [(m.role, m.content) for m in start.chat.messages] == [("user", "hi")]
    assert not start.chat.template_arguments


def test_template_arguments_are_sent_as_json() -> None:
    messages = [{"role": "user", "content": "hi"}]
    given: dict[str, object] = {"enable_thinking": False, "a": ["ü", 2**70, 1.0, None]}
    start = start_generation(messages, template_arguments=given)
    assert json.loads(start.chat.template_arguments) == given
    circle: list[object] = []
    circle.append(circle)
    deep: object = 0
    for _ in range(10_000):
        deep = [deep]
    for prompt, value, says in (
        ("hello", 1, "needs messages"),
        (messages, float("nan"), "is no JSON"),
        (messages, "\ud800", "is not UTF-8"),
        (messages, circle, "is no JSON"),
        (messages, deep, "is no JSON"),
    ):
        with pytest.raises(millrace.MillraceError, match=f"template_arguments: {says}"):
            start_generation(prompt, template_arguments={"a": value})
    with pytest.raises(TypeError, match="not JSON serializable"):
        start_generation(messages, template_arguments={"a": object()})


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (7, "text, token ids or messages, and no mix of them, found int"),
        (None, "found NoneType"),
        (b"hello", "found bytes"),
        ([1.5], "found float at 0"),
        ([1, {"role": "user", "content": "hi"}], "found int at 0"),
        ([{"role": "user", "content": "hi"}, "you"], "found str at 1"),
        ([{"role": "user"}], "message 0 of the prompt needs role and content"),
        ([{"role": "user", "content": ["hi"]}], "message 0 of the prompt needs role and content"),
    ],
)
def test_what_is_no_prompt_is_told_apart(prompt: object, says: str) -> None:
    with pytest.raises(TypeError) as raised:
        start_generation(prompt)  # type: ignore[arg-type]
    assert says in str(raised.value)


def test_token_ids_out_of_range_are_refused_without_all_of_them() -> None:
    with pytest.raises(millrace.MillraceError) as raised:
        start_generation([1] * 1000 + [-1])
    assert raised.value.reason == "INVALID_FIELD"
    assert str(raised.value) == "ids: out of range, found [1, 1, 1, 1, 1, 1, ...]."


def test_stream_that_is_closed_while_its_call_opens_is_cancelled() -> None:
    """Another thread may close it just then: the call that it cannot see yet is cancelled too."""
    cancelled = threading.Event()

    class Call:
        def __iter__(self) -> Iterator[runtime_pb2.GenerateStreamResponse]:
            assert cancelled.is_set(), "it is read, and nobody ends it"
            return iter(())

        def cancel(self) -> None:
            cancelled.set()

    def open_call(request: runtime_pb2.GenerateStreamRequest, timeout_s: float | None) -> Call:
        stream.close()
        return Call()

    command = runtime_pb2.GenerateStreamRequest(start=start_generation("hello"))
    stream = Stream(open_call, command, "127.0.0.1:1", Retries())
    assert list(stream) == []
    assert cancelled.is_set()


def refusing(refused: threading.Event | asyncio.Event) -> Callable[..., Any]:
    """Opens no call: it is to be tried again much later. `refused` is set once it was asked for."""

    def refuse(request: runtime_pb2.GenerateStreamRequest, timeout_s: float | None) -> Any:
        refused.set()
        raise millrace.MillraceError(
            "Busy.", "QUEUE_FULL", grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after_s=90.0
        )

    return refuse


def test_closing_ends_the_wait_for_another_try() -> None:
    refused = threading.Event()
    command = runtime_pb2.GenerateStreamRequest(start=start_generation("hello"))
    stream = Stream(refusing(refused), command, "127.0.0.1:1", Retries(max_delay_s=90.0))
    reading = threading.Thread(target=lambda: list(stream), daemon=True)
    reading.start()
    assert refused.wait(60)
    stream.close()
    reading.join(60)
    assert not reading.is_alive()


async def test_closing_ends_an_async_streams_wait_for_another_try() -> None:
    refused = asyncio.Event()
    command = runtime_pb2.GenerateStreamRequest(start=start_generation("hello"))
    stream = AsyncStream(refusing(refused), command, "127.0.0.1:1", Retries(max_delay_s=90.0))
    reading = asyncio.ensure_future(anext(aiter(stream), None))
    await refused.wait()
    await stream.close()
    assert await asyncio.wait({reading}, timeout=60) == ({reading}, set())


@pytest.mark.parametrize(
    ("prompt", "options", "says"),
    [
        ("caf\udce9", {}, "prompt: is not UTF-8"),
        ([{"role": "user", "content": "\ud800"}], {}, "message 0 of the prompt: is not UTF-8"),
        ("hello", {"stop": "\ud83d"}, "stop: is not UTF-8"),
        ("hello", {"model": "\udfff"}, "model: is not UTF-8"),
    ],
)
def test_text_that_is_no_unicode_is_refused_by_its_name(
    prompt: Any, options: Any, says: str
) -> None:
    """Half of a surrogate pair, as Python reads bytes of a command line that are none of UTF-8."""
    with pytest.raises(millrace.MillraceError, match=says) as caught:
        start_generation(prompt, **options)
    assert caught.value.reason == "INVALID_FIELD"


@pytest.mark.parametrize("timeout_s", [float("inf"), float("nan"), 1e300])
def test_timeout_that_no_clock_can_keep_is_refused(timeout_s: float) -> None:
    with pytest.raises(millrace.MillraceError, match="timeout_s: ") as caught:
        start_generation("hello", timeout_s=timeout_s)
    assert caught.value.reason == "INVALID_FIELD"
