"""What OpenAI's clients ask for: what reaches the runtime, what is taken, what is refused by its name."""

import gzip
import json
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import (
    BadRequestError,
)

from runtime_service.gateway.http.openai_requests import (
    ChatRequest,
    CompletionRequest,
    parse,
    starts_of_chat,
    starts_of_completion,
)
from shared.errors import InvalidField
from tests.runtime_service.daemon import publish_echo
from tests.runtime_service.gateway.openai_client import HELLO, TEXT, serving


async def test_every_sampling_parameter_reaches_the_runtime(tmp_path: Path) -> None:
    async with serving(tmp_path, num_runtimes=1) as (fleet, client):
        started: list[Any] = []
        new_generation = fleet.gateway.start

        def start(generation: Any, start: Any, cache_salt: str) -> None:
            started.append(start)
            new_generation(generation, start, cache_salt)

        fleet.gateway.start = start  # type: ignore[method-assign]
        await client.chat.completions.create(
            model="echo", messages=HELLO, max_completion_tokens=7, temperature=0.5, top_p=0.25, n=2,
            seed=9, presence_penalty=1.5, frequency_penalty=-0.5, logit_bias={"5": -100}, user="me",
            stop="x",
            extra_body={"top_k": 3, "min_p": 0.125, "repetition_penalty": 1.25, "min_tokens": 2,
                        "stop_token_ids": [8], "ignore_eos": True, "priority": 4},
        )  # fmt: skip
        await client.chat.completions.create(model="echo", messages=HELLO, max_tokens=5)
    sampling, stop = started[0].sampling, started[0].stop
    assert (sampling.temperature, sampling.top_p, sampling.n, sampling.seed) == (0.5, 0.25, 2, 9)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1.5, -0.5)
    assert dict(sampling.logit_bias) == {5: -100}
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (3, 0.125, 1.25)
    assert (stop.max_new_tokens, stop.min_new_tokens, list(stop.strings)) == (7, 2, ["x"])
    assert (list(stop.token_ids), stop.ignore_end_tokens, started[0].priority) == ([8], True, 4)
    assert (started[1].sampling.temperature, started[1].stop.max_new_tokens) == (1.0, 5)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}], "tools cannot be called yet"),
        ("response_format", {"type": "json_object"}, "JSON cannot be enforced"),
        ("temperature", 101, "from 0 to 100"),
        ("temperature", "hot", "expected `float"),
        ("top_p", 0, "over 0"),
        ("n", 65, "from 1 to 64"),
        ("n", 0, "at least 1"),
        ("max_tokens", 0, "at least 1"),
        ("max_tokens", 1 << 40, "out of range"),
        ("top_logprobs", 2, "needs logprobs"),
        ("logit_bias", {"hello": 1}, "no token id"),
        ("logit_bias", {"99999": 1}, "below the vocabulary"),
        ("stop", ["x"] * 17, "at most 16"),
        ("stop_token_ids", [-1], "must be token ids"),
        ("stream_options", {"include_usage": True}, "needs stream"),
        ("messages", [], "at least one"),
        ("messages", [{"role": "tool", "content": "4"}], "tools cannot be called yet"),
        ("messages", [{"role": "user", "content": [{"type": "image_url"}]}], "must be text"),
        ("wings", 2, "wings: is not known"),
        ("wi\nngs", 2, "'wi\\nngs': is not known"),
        ("messages", [{"role": "user", "wings": 2}], "messages[0].wings: is not known"),
        ("messages", [{"content": "x"}], "messages[0].role: must be given"),
        ("messages", [{"role": "user"}], "messages[0].content: must be given"),
        (
            "messages",
            [{"role": "user", "content": [{"type": "text", "txt": "x"}]}],
            "messages[0].content[0].text: must be given",
        ),
        ("top_p", 1.1, "at most 1, found 1.1."),
        ("temperature", -0.1, "from 0 to 100, found -0.1."),
        ("top_k", -2, "from 0"),
        ("guided_json", {"type": "object"}, "cannot be made to follow"),
        ("structured_outputs", {"regex": "a+"}, "cannot be made to follow"),
        ("chat_template_kwargs", {"enable_thinking": False}, "reads no 'enable_thinking'"),
        ("chat_template_kwargs", {"messages": []}, "messages is not for requests to set"),
        ("chat_template_kwargs", [], "expected `object"),
        ("chat_template_kwargs", {"x": "y" * (64 << 10)}, "at most 65536 bytes"),
        ("documents", [{"text": "a"}], "chat_template_kwargs takes it"),
        ("bad_words", ["x"], "logit_bias"),
        ("skip_special_tokens", False, "special tokens"),
        ("add_special_tokens", True, "tokenized as they always are"),
        ("prompt_logprobs", 1, "millrace.runtime.v1"),
        ("use_beam_search", True, "no beam search"),
        ("tool_choice", "required", "tools cannot be called yet"),
        ("store", True, "not stored"),
        ("enable_thinking", False, "thinking is text"),
        ("include_reasoning", False, "thinking is text"),
        ("verbosity", "low", "say it in the messages"),
        ("stop_regex", "a+", "use stop"),
        ("messages", [{"role": "assistant", "content": "a", "prefix": True}], "own template"),
        ("messages", [{"role": "assistant", "tool_calls": [{}]}], "tools cannot be called yet"),
        ("cache_salt", "mine", "tenant"),
        ("stream", {"include": 1}, "expected `bool"),
    ],
)
async def test_bad_fields_are_named(tmp_path: Path, field: str, value: Any, says: str) -> None:
    async with serving(tmp_path, num_runtimes=1) as (_, client):
        with pytest.raises(BadRequestError) as raised:
            await client.chat.completions.create(
                **{"model": "echo", "messages": HELLO, "extra_body": {field: value}}
            )
    assert raised.value.type == "invalid_request_error"
    assert raised.value.code == "invalid_field"
    assert says in raised.value.message
    named = raised.value.param or ""
    assert named in (field, repr(field)) or named.startswith(f"{field}[")


NEUTRAL: dict[str, Any] = {
    "use_beam_search": False, "length_penalty": 1.0, "skip_special_tokens": True,
    "spaces_between_special_tokens": True, "include_stop_str_in_output": False, "bad_words": [],
    "chat_template_kwargs": {}, "return_token_ids": False, "request_id": "r", "best_of": 1,
    "prompt_logprobs": None, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "min_tokens": 0,
    "stop_token_ids": [], "ignore_eos": False, "priority": 0, "guided_json": None, "no_stop_trim": False,
    "user": "me", "metadata": {"chat": "1"}, "store": False, "service_tier": "auto", "tools": [],
    "tool_choice": "auto", "parallel_tool_calls": True, "response_format": {"type": "text"},
    "modalities": ["text"], "verbosity": "medium", "reasoning_effort": None, "n": 1, "stop": None,
    "logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0.0, "top_p": 1, "seed": None,
    "prompt_cache_key": "k", "safety_identifier": "s", "max_completion_tokens": None, "audio": None,
    "separate_reasoning": True, "stream_reasoning": True, "include_reasoning": True, "documents": [],
    "repetition_min_count": 0, "stream_options": None, "wings": None, "logprobs": None,
}  # fmt: skip


async def test_fields_that_other_servers_know_are_taken_where_they_ask_for_nothing(
    tmp_path: Path,
) -> None:
    """What vLLM's and SGLang's clients send by default changes nothing."""
    chat, complete = {"add_generation_prompt": True}, {"add_special_tokens": True, "echo": False}
    async with serving(tmp_path, num_runtimes=1) as (_, client):
        answers = [
            await client.chat.completions.create(
                model="echo", messages=HELLO, extra_body={**extra, "add_special_tokens": False}
            )
            for extra in ({}, {**NEUTRAL, **chat})
        ]
        texts = [
            await client.completions.create(model="echo", prompt=TEXT, extra_body=extra)
            for extra in ({}, {**NEUTRAL, **complete})
        ]
    assert answers[0].choices == answers[1].choices
    assert texts[0].choices == texts[1].choices


THINKS = (
    "{{ messages[0].content }}{% if enable_thinking is defined and not enable_thinking %}"
    "<think></think>{% endif %}{{ shown | default('') }}"
)


async def test_chat_template_is_given_what_requests_say(tmp_path: Path) -> None:
    """As Qwen3's users switch its thinking off; the echo says what the template made of it."""
    publish = partial(publish_echo, chat_template=THINKS)
    async with serving(tmp_path, num_runtimes=1, publish=publish) as (_, client):

        async def answer(arguments: Any) -> str | None:
            extra = {"chat_template_kwargs": arguments}
            answer = await client.chat.completions.create(
                model="echo", messages=HELLO, extra_body=extra, max_tokens=len(THINKS)
            )
            return answer.choices[0].message.content

        once = "hello Wörld"
        for arguments, rendered in (
            (None, once),
            ({}, once),
            ({"enable_thinking": True}, once),
            ({"enable_thinking": False}, once + "<think></think>"),
            ({"shown": ["ü", 1, 1.0, None]}, once + "['ü', 1, 1.0, None]"),
        ):
            assert ((await answer(arguments)) or "").startswith(rendered + once)
        with pytest.raises(BadRequestError) as raised:
            await answer({"enable_thinkng": False})
    assert raised.value.param == "chat_template_kwargs"
    assert "it reads enable_thinking, shown" in raised.value.message


def test_template_arguments_of_any_depth_are_written_or_refused() -> None:
    """There is a depth that is just read, and no more written."""
    for depth in range(900, 1000):
        body = b'{"messages": [], "chat_template_kwargs": {"x": %s%s}}' % (
            b"[" * depth,
            b"]" * depth,
        )
        with suppress(InvalidField):
            starts_of_chat(parse(body, ChatRequest))


async def test_answers_come_back_as_history_in_the_form_that_any_server_gave_them(
    tmp_path: Path,
) -> None:
    """Agents and chat pages send a message again with all that it had."""
    echoed: dict[str, Any] = {
        "reasoning": "so far", "reasoning_content": "so far", "thinking_blocks": [],
        "provider_specific_fields": {"a": 1}, "cache_control": {"type": "ephemeral"}, "name": "it",
    }  # fmt: skip
    async with serving(tmp_path, num_runtimes=1) as (_, client):
        first = await client.chat.completions.create(model="echo", messages=HELLO)
        said = first.choices[0].message.model_dump()
        assert {"refusal", "tool_calls", "function_call"} <= said.keys()
        parts = [{"type": "text", "text": said["content"], "annotations": []}]
        plain = {"role": "assistant", "content": said["content"]}
        used = []
        for turn in (plain, said, {**said, **echoed}, {**said, "content": parts}):
            messages: list[Any] = [*HELLO, turn, *HELLO]
            answer = await client.chat.completions.create(model="echo", messages=messages)
            assert answer.usage is not None
            used.append(answer.usage.prompt_tokens)
    assert len(set(used)) == 1, "it is the same conversation"


def test_options_of_a_stream_that_are_null_are_unset() -> None:
    options = dict.fromkeys(("include_usage", "include_obfuscation", "continuous_usage_stats"))
    body = json.dumps({"messages": HELLO, "stream": True, "stream_options": options}).encode()
    asked = parse(body, ChatRequest)
    assert starts_of_chat(asked)
    assert asked.stream_options is not None
    assert not asked.stream_options.include_usage


@pytest.mark.parametrize("logprobs", [-1, 21, 1 << 40])
def test_logprobs_of_completions_are_refused_by_their_own_name(logprobs: int) -> None:
    """Chats call that number top_logprobs."""
    body = json.dumps({"prompt": "a", "logprobs": logprobs}).encode()
    with pytest.raises(InvalidField, match=f"^logprobs: must be from 0 to 20, found {logprobs}"):
        starts_of_completion(parse(body, CompletionRequest))


async def test_bodies_that_are_no_request_are_refused(tmp_path: Path) -> None:
    async with serving(tmp_path, num_runtimes=1) as (fleet, _):
        url = f"http://{fleet.http.address}/v1/chat/completions"
        json_type = {"Content-Type": "application/json"}

        def coded(coding: str) -> dict[str, str]:
            return {**json_type, "Content-Encoding": coding}

        gzipped = coded("gzip")
        async with aiohttp.ClientSession() as session:
            for data, headers, status, says in (
                (b"{", json_type, 400, "body: is not JSON"),
                (b"[]", json_type, 400, "body: must be a JSON object"),
                (b'"\xff"', json_type, 400, "body: is not JSON"),
                (b"[" * 100_000, json_type, 400, "body: is not JSON"),
                (b"{}", {"Content-Type": "text/plain"}, 400, "Content-Type: must be"),
                (b"x" * (2 << 20), json_type, 413, "over the 1048576 bytes of MILLRACE_MAX"),
                (b'"\\ud800"', json_type, 400, "body: has half of a UTF-16 surrogate pair"),
                (b"{}", gzipped, 400, "body: cannot be read as gzip"),
                (gzip.compress(b"{}")[:-1], gzipped, 400, "body: ends before its gzip does"),
                (gzip.compress(b"{}") + b"{}", gzipped, 400, "or goes on after it"),
                (gzip.compress(b" " * (2 << 20)), gzipped, 413, "over the 1048576 bytes"),
                (b"{}", coded("br"), 400, "Content-Encoding: must be gzip, found 'br'"),
                (b"{}", coded("zstd"), 400, "Content-Encoding: must be gzip, found 'zstd'"),
                (b"{}", coded("gzip, br"), 400, "found 'gzip, br'"),
                (b"{}", coded("Identity"), 400, "messages: must be given"),
                (gzip.compress(b"{}"), gzipped, 400, "messages: must be given"),
            ):
                async with session.post(url, data=data, headers=headers) as response:
                    assert response.status == status
                    assert says in (await response.json())["error"]["message"]
            for method, path, status, says in (
                ("PUT", url, 405, "it takes: GET, POST"),
                ("GET", url + "/x", 404, "'/v1/chat/completions/x'; there are: /,"),
            ):
                async with session.request(method, path) as response:
                    assert response.status == status
                    error = (await response.json())["error"]
                    assert error["type"] == "invalid_request_error"
                    assert says in error["message"]
                    assert ("Allow" in response.headers) is (status == 405)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (rb'{"messages": [{"role": "user", "content": "hi \ud800"}]}', "messages[0].content"),
        (rb'{"messages": [{"role": "user", "content": "\ud83d\u0041"}]}', "messages[0].content"),
        (rb'{"messages": [], "stop": ["a", "\udc00"]}', "stop[1]"),
        (rb'{"model": "\ud800", "messages": []}', "model"),
        (rb'{"\ud800": 1, "messages": []}', "body"),
    ],
)
def test_half_of_a_surrogate_pair_is_told_with_its_field(body: bytes, param: str) -> None:
    """Encoders that cut text in the middle of a character write such JSON."""
    with pytest.raises(InvalidField) as refused:
        parse(body, ChatRequest)
    assert str(refused.value) == f"{param}: has half of a UTF-16 surrogate pair."


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


FIELDS = tuple({*ChatRequest.__struct_fields__, *CompletionRequest.__struct_fields__, "tools", "x"})


@given(st.dictionaries(st.sampled_from(sorted(FIELDS)), ANY_JSON))
def test_bodies_of_any_json_make_starts_or_are_refused(fields: dict[str, Any]) -> None:
    """Each by itself too, beside what is right: else one wrong field would hide the others."""
    right = {"messages": HELLO}, {"prompt": "a"}
    for some in (fields, *({name: value} for name, value in fields.items())):
        for kind, starts_of, base in (
            (ChatRequest, starts_of_chat, right[0]),
            (CompletionRequest, starts_of_completion, right[1]),
        ):
            body = json.dumps({**base, **some}).encode()
            with suppress(InvalidField):
                assert starts_of(parse(body, kind))  # type: ignore[operator,type-var]
