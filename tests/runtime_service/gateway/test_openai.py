"""OpenAI's own Python client, at a gateway in front of runtimes that echo: what it is answered."""

from pathlib import Path
from typing import Any

import aiohttp
import pytest
from openai import (
    BadRequestError,
    NotFoundError,
)
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs

from tests.runtime_service.daemon import TOKENIZER
from tests.runtime_service.gateway.openai_client import HELLO, TEXT, serving


async def test_chat_goes_through_the_models_template(tmp_path: Path) -> None:
    """The echo says what the template made of the messages, up to its first end token."""
    messages: list[Any] = [
        {
            "role": "developer",
            "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "kind"}],
        },
        *HELLO,
    ]
    async with serving(tmp_path) as (fleet, client):
        answer = await client.chat.completions.create(model="echo", messages=messages)
        engine = next(iter(fleet.fleet)).status.engine.name
    (choice,) = answer.choices
    assert (choice.index, choice.message.role) == (0, "assistant")
    assert choice.message.content == "system\nbe kind"
    assert choice.finish_reason == "stop"
    assert (answer.object, answer.model) == ("chat.completion", "echo")
    assert answer.id.startswith("chatcmpl-")
    assert answer.system_fingerprint == "fp_" + engine.partition("/")[2][:12]
    assert answer.usage is not None
    rendered = "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhello Wörld<|im_end|>\n<|im_start|>assistant\n"
    assert answer.usage.prompt_tokens == len(TOKENIZER.encode(rendered).ids)
    shown = len(TOKENIZER.encode("<|im_start|>system\nbe kind<|im_end|>").ids)
    assert answer.usage.completion_tokens == shown
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + shown


async def test_chat_streams_deltas_then_the_end_then_usage(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, client):
        stream = await client.chat.completions.create(
            model="echo", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(texts) == "user\nhello Wörld"
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + [
        "stop"
    ]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(
        TOKENIZER.encode("<|im_start|>user\nhello Wörld<|im_end|>").ids
    )
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


async def test_usage_is_told_in_every_chunk_where_a_client_asks_for_it(tmp_path: Path) -> None:
    """As vLLM's and GuideLLM's clients ask: a choice's own until then, and all of it at the end."""
    options: dict[str, Any] = {"include_usage": True, "continuous_usage_stats": True}
    async with serving(tmp_path, num_runtimes=1) as (_, client):
        stream = await client.completions.create(
            model="echo",
            prompt=["ab", "cde"],
            n=2,
            max_tokens=3,
            stream=True,
            stream_options=options,
        )
        chunks = [chunk async for chunk in stream]
    told: dict[int, list[tuple[int, int]]] = {}
    for chunk in chunks[:-1]:
        assert chunk.usage is not None
        used = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
        assert chunk.usage.total_tokens == sum(used)
        told.setdefault(chunk.choices[0].index, []).append(used)
    prompts = [len(TOKENIZER.encode(text).ids) for text in ("ab", "cde")]
    for index, used_by_choice in told.items():
        assert used_by_choice == sorted(used_by_choice)
        assert used_by_choice[-1] == (prompts[index // 2], 3)
    assert sorted(told) == [0, 1, 2, 3]
    last = chunks[-1].usage
    assert last is not None
    assert (last.prompt_tokens, last.completion_tokens) == (sum(prompts), 12)


async def test_completions_take_texts_and_token_ids_and_number_their_choices(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path) as (_, client):
        one = await client.completions.create(model="echo", prompt=TEXT)
        many = await client.completions.create(
            model="echo", prompt=["ab", "cd"], n=2, max_tokens=2, stop=None
        )
        ids = await client.completions.create(model="echo", prompt=[40, 41, 42], max_tokens=3)
        lists = await client.completions.create(model="echo", prompt=[[40, 41], [42]], max_tokens=2)
        stream = await client.completions.create(
            model="echo", prompt=["ab", "cd"], n=2, max_tokens=2, stream=True
        )
        streamed: dict[int, str] = {}
        async for chunk in stream:
            for choice in chunk.choices:
                streamed[choice.index] = streamed.get(choice.index, "") + choice.text
    assert one.usage is not None
    assert one.usage.completion_tokens == 16
    assert one.choices[0].finish_reason == "length"
    assert TEXT.startswith(one.choices[0].text)
    assert [(c.index, c.text) for c in many.choices] == [(0, "ab"), (1, "ab"), (2, "cd"), (3, "cd")]
    assert streamed == {0: "ab", 1: "ab", 2: "cd", 3: "cd"}
    assert ids.choices[0].text == TOKENIZER.decode([40, 41, 42])
    assert [c.text for c in lists.choices] == [
        TOKENIZER.decode([40, 41]),
        TOKENIZER.decode([42, 42]),
    ]


async def test_stop_strings_end_text_before_them(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, client):
        answer = await client.completions.create(
            model="echo", prompt=TEXT, max_tokens=200, stop=["STO V", "never"], seed=-1
        )
    assert answer.choices[0].text == TEXT.partition("STO V")[0]
    assert answer.choices[0].finish_reason == "stop"


async def test_chat_logprobs_have_a_token_its_bytes_and_the_likeliest(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, client):
        answer = await client.chat.completions.create(
            model="echo", messages=HELLO, logprobs=True, top_logprobs=1
        )
        stream = await client.chat.completions.create(
            model="echo", messages=HELLO, logprobs=True, top_logprobs=1, stream=True
        )
        chunks = [chunk async for chunk in stream]
    assert answer.choices[0].logprobs is not None
    rows = answer.choices[0].logprobs.content
    assert rows is not None
    assert (
        b"".join(bytes(row.bytes or []) for row in rows).decode()
        == "<|im_start|>user\nhello Wörld<|im_end|>"
    )
    assert [row.token for row in rows][:2] == ["<|im_start|>", "u"]
    assert {row.logprob for row in rows} == {-0.25}
    assert [row.top_logprobs[0].token for row in rows] == [row.token for row in rows]
    streamed = [
        row
        for chunk in chunks
        if chunk.choices[0].logprobs is not None
        for row in chunk.choices[0].logprobs.content or []
    ]
    assert streamed == rows


async def test_completion_logprobs_are_lists_with_offsets(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, client):
        ask: Any = {"model": "echo", "prompt": "hello aö", "logprobs": 1}
        answer = await client.completions.create(**ask)
        stream = await client.completions.create(**ask, stream=True)
        chunks = [chunk async for chunk in stream]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    # A token that is a part of a character is spelled in bytes, and has no characters.
    assert logprobs.tokens[:5] == ["hello", " a", "bytes:\\xc3", "bytes:\\xb6", "hello"]
    assert logprobs.text_offset is not None
    assert logprobs.text_offset[:5] == [0, 5, 7, 7, 8]
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[0] == {"hello": -0.25}
    offsets = [
        offset
        for chunk in chunks
        if chunk.choices[0].logprobs is not None
        for offset in chunk.choices[0].logprobs.text_offset or []
    ]
    assert offsets == logprobs.text_offset


async def test_a_base_without_v1_and_endpoints_that_are_missing_are_told_what_there_is(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path, num_runtimes=1) as (fleet, client):
        base = f"http://{fleet.http.address}"
        with pytest.raises(NotFoundError, match=r"there are: .*/v1/chat/completions"):
            await client.with_options(base_url=base).chat.completions.create(
                model="echo", messages=HELLO
            )
        with pytest.raises(NotFoundError, match="Nothing is served at '/v1/responses'"):
            await client.responses.create(model="echo", input="hello")


async def test_every_answer_names_its_request_and_not_its_server(tmp_path: Path) -> None:
    async with serving(tmp_path, num_runtimes=1) as (fleet, client):
        chat = await client.chat.completions.create(model="echo", messages=HELLO)
        with pytest.raises(BadRequestError) as refused:
            await client.completions.create(model="echo", prompt="")
        with capture_logs(processors=[merge_contextvars]) as lines:
            async with aiohttp.ClientSession(f"http://{fleet.http.address}") as session:
                answers = [
                    await session.request(method, path, headers={"X-Request-Id": given})
                    for method, path, given in (
                        ("HEAD", "/health", "mine-1"),
                        ("GET", "/nowhere", "mine-2"),
                        ("GET", "/v1/models", "two words"),
                    )
                ]
    names = [answer.headers["X-Request-Id"] for answer in answers]
    assert str(chat._request_id).startswith("req_")
    assert str(refused.value.request_id).startswith("req_")
    assert chat._request_id != refused.value.request_id
    assert [answer.status for answer in answers] == [200, 404, 200]
    assert names[:2] == ["mine-1", "mine-2"]
    assert names[2].startswith("req_")
    assert {answer.headers["Server"] for answer in answers} == {"millrace"}
    told = [line["http_request_id"] for line in lines if line["event"] == "http_finished"]
    assert told == [names[0], names[2]]


async def test_unknown_model_is_told_which_there_are(tmp_path: Path) -> None:
    async with serving(tmp_path, num_runtimes=1) as (_, client):
        models = [model.id async for model in client.models.list()]
        one = await client.models.retrieve("echo")
        with pytest.raises(NotFoundError) as unknown:
            await client.models.retrieve("gpt-4")
        with pytest.raises(NotFoundError) as raised:
            await client.chat.completions.create(model="gpt-4", messages=HELLO)
        with pytest.raises(BadRequestError, match="embeddings"):
            await client.embeddings.create(model="echo", input="x")
    assert models == ["echo"]
    assert (one.id, one.owned_by) == ("echo", "millrace")
    assert raised.value.code == unknown.value.code == "model_not_found"
    assert "there are: echo" in raised.value.message
