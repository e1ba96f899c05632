"""OpenAI's own Python client, at a gateway in front of runtimes that echo."""

import asyncio
import gzip
import json
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import (
    APIError,
    APIStatusError,
    AsyncOpenAI,
    AuthenticationError,
    BadRequestError,
    InternalServerError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
)
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs

from runtime_service.gateway.http.openai_requests import (
    ChatRequest,
    CompletionRequest,
    parse,
    starts_of_chat,
    starts_of_completion,
)
from shared.auth import ApiKeys
from shared.errors import InvalidField
from shared.security import ServerSecurity
from tests.runtime_service.daemon import ENDLESS, ENDLESS_TOKENS, HANG_S, TOKENIZER, until
from tests.runtime_service.gateway.running_gateway import RunningGateway, kill, running_fleet
from tests.shared.key_files import new_key

TEXT = "Zwölf Boxkämpfer 🙂 jagen STO Viktor; "
NUM_TOKENS = len(TOKENIZER.encode(TEXT).ids)
HELLO: list[Any] = [{"role": "user", "content": "hello Wörld"}]


def client_of(fleet: RunningGateway, key: str = "none") -> AsyncOpenAI:
    """A client that does not try again by itself."""
    return AsyncOpenAI(
        base_url=f"http://{fleet.http.address}/v1", api_key=key, max_retries=0, timeout=2 * HANG_S
    )


@asynccontextmanager
async def serving(
    folder: Path, **options: Any
) -> AsyncIterator[tuple[RunningGateway, AsyncOpenAI]]:
    """A fleet and a client of it."""
    async with running_fleet(folder, **options) as fleet, client_of(fleet) as client:
        yield fleet, client


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
        ("top_k", -2, "from 0"),
        ("guided_json", {"type": "object"}, "cannot be made to follow"),
        ("structured_outputs", {"regex": "a+"}, "cannot be made to follow"),
        ("chat_template_kwargs", {"enable_thinking": False}, "the model's own template"),
        ("bad_words", ["x"], "logit_bias"),
        ("skip_special_tokens", False, "special tokens"),
        ("add_special_tokens", True, "tokenized as they always are"),
        ("prompt_logprobs", 1, "millrace.runtime.v1"),
        ("use_beam_search", True, "no beam search"),
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


async def test_client_that_leaves_ends_its_generation(tmp_path: Path) -> None:
    async with serving(tmp_path, num_runtimes=1, step_s=0.01, **ENDLESS) as (fleet, client):
        stream = await client.completions.create(
            model="echo", prompt=TEXT, max_tokens=ENDLESS_TOKENS, stream=True
        )
        async for _ in stream:
            break
        assert fleet.sample("running_generations") == 1
        await stream.close()
        await until(lambda: fleet.sample("running_generations") == 0)
        whole = asyncio.create_task(
            client.completions.create(model="echo", prompt=TEXT, max_tokens=ENDLESS_TOKENS)
        )
        await until(lambda: fleet.sample("running_generations") == 1)
        whole.cancel()
        await until(lambda: fleet.sample("running_generations") == 0)
        await fleet.daemons[0].freed()
        assert fleet.sample("generations_total", reason="client_gone") == 2


@pytest.mark.parametrize("seed", [1, 2])
async def test_storm_of_leaving_clients_gives_every_block_back(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    async with serving(tmp_path, step_s=0.002, **ENDLESS) as (fleet, client):

        async def ask(number: int) -> None:
            stream = await client.completions.create(
                model="echo", prompt=[40, 41 + number], max_tokens=ENDLESS_TOKENS, stream=True
            )
            num_chunks = draw.randrange(30)
            async for _ in stream:
                num_chunks -= 1
                if num_chunks < 0:
                    break
            await stream.close()

        await asyncio.gather(*(ask(number) for number in range(60)))
        await until(lambda: fleet.sample("running_generations") == 0)
        assert fleet.sample("generations_total", reason="client_gone") == 60
        for daemon in fleet.daemons:
            await daemon.freed()


async def test_stream_survives_the_loss_of_its_runtime(tmp_path: Path) -> None:
    async with serving(tmp_path, step_s=0.005) as (fleet, client):
        stream = await client.completions.create(
            model="echo", prompt=TEXT, max_tokens=4 * NUM_TOKENS, stream=True
        )
        text = ""
        is_killed = False
        async for chunk in stream:
            text += chunk.choices[0].text
            if len(text) > 10 and not is_killed:
                is_killed = True
                await kill(fleet.busiest())
    assert text == TEXT * 4


async def test_failure_in_a_stream_is_an_event_and_before_it_a_status(tmp_path: Path) -> None:
    some = {"num_runtimes": 1, "step_s": 0.01, "wait_s": 0.1, **ENDLESS}
    async with serving(tmp_path, **some) as (fleet, client):
        stream = await client.completions.create(
            model="echo", prompt=TEXT, max_tokens=ENDLESS_TOKENS, stream=True
        )
        await anext(aiter(stream))
        await kill(fleet.daemons[0])
        with pytest.raises(APIError) as raised:
            [chunk async for chunk in stream]
        assert not isinstance(raised.value, APIStatusError)
        assert raised.value.code == "engine_lost"
        with pytest.raises(InternalServerError) as refused:
            await client.completions.create(model="echo", prompt=TEXT, stream=True)
    assert refused.value.status_code == 503
    assert int(refused.value.response.headers["retry-after"]) >= 1


async def test_keys_scopes_and_quotas_have_their_statuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = tmp_path / "keys"
    good = new_key(capsys, keys, "acme", concurrent=1)
    poor = new_key(capsys, keys, "poor", tokens_per_min=6)
    builder = new_key(capsys, keys, "builder", "build")
    security = ServerSecurity(api_keys=ApiKeys(keys))
    ask: Any = {"model": "echo", "prompt": TEXT, "max_tokens": 8}
    options = {"gateway_security": security, "step_s": 0.01, **ENDLESS}
    async with running_fleet(tmp_path, 1, **options) as fleet:
        async with client_of(fleet, "mr_x_y") as client:
            with pytest.raises(AuthenticationError) as wrong:
                await client.models.list()
        assert wrong.value.code == "invalid_api_key"
        async with client_of(fleet, builder) as client:
            with pytest.raises(PermissionDeniedError, match="'generate'"):
                await client.completions.create(**ask)
        async with client_of(fleet, poor) as client:
            await client.completions.create(**ask)
            with pytest.raises(RateLimitError) as too_many:
                await client.completions.create(**ask)
            seconds = int(too_many.value.response.headers["retry-after"])
            # It has used more than a minute's, and asks for more than is left of the next ones.
            assert 60 < seconds <= 1200
        async with client_of(fleet, good) as client:
            endless = {**ask, "max_tokens": ENDLESS_TOKENS, "stream": True}
            stream = await client.completions.create(**endless)
            with pytest.raises(RateLimitError) as busy:
                await client.completions.create(**ask)
            assert busy.value.code == "rate_limit_exceeded"
            await stream.close()


async def test_draining_gateway_finishes_streams_and_refuses_others(tmp_path: Path) -> None:
    async with serving(tmp_path, num_runtimes=1, step_s=0.005) as (fleet, client):
        stream = await client.completions.create(
            model="echo", prompt=TEXT, max_tokens=2 * NUM_TOKENS, stream=True
        )
        chunks = aiter(stream)
        text = (await anext(chunks)).choices[0].text
        fleet.server.edge.is_draining = True
        draining = asyncio.create_task(fleet.gateway.drain(HANG_S))
        with pytest.raises(InternalServerError) as refused:
            await client.models.list()
        assert refused.value.status_code == 503
        async for chunk in chunks:
            text += chunk.choices[0].text
        await draining
        await fleet.server.edge.wait_idle()
    assert text == TEXT * 2


async def test_slow_reader_holds_its_stream_up_and_gets_everything(tmp_path: Path) -> None:
    """What it does not take waits in its generations, joined, and not in the HTTP server."""
    ask = {"prompt": [40], "n": 16, "max_tokens": 500, "stream": True, "logprobs": 1}
    body = json.dumps(ask).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    head += "Content-Type: application/json\r\nConnection: close\r\n\r\n"
    async with serving(tmp_path, num_runtimes=1, num_blocks=2048) as (fleet, _):
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.setblocking(False)
            host, _, port = fleet.http.address.partition(":")
            loop = asyncio.get_running_loop()
            await loop.sock_connect(connection, (host, int(port)))
            reader, writer = await asyncio.open_connection(sock=connection, limit=4096)
            # Else the system takes megabytes of it off the server's hands.
            await until(lambda: fleet.http._runner.server.connections)
            for server_side in fleet.http._runner.server.connections:
                buffer = server_side.transport.get_extra_info("socket")
                buffer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            writer.write(head.encode() + body)
            await until(lambda: fleet.sample("generations_total", reason="finished") == 1)
            rpc = {"rpc": "POST /v1/completions"}
            assert fleet.registry.get_sample_value("millrace_rpcs_running", rpc) == 1
            answer = (await reader.read()).decode()
            assert fleet.registry.get_sample_value("millrace_rpcs_running", rpc) == 0
            writer.close()
    texts = dict.fromkeys(range(16), "")
    for line in answer.splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                texts[choice["index"]] += choice["text"]
    assert texts == dict.fromkeys(range(16), TOKENIZER.decode([40]) * 500)
    assert "data: [DONE]" in answer


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


async def test_open_server_answers_no_page_of_another_name(tmp_path: Path) -> None:
    """A site whose name is made to lead to 127.0.0.1 would else read what this machine says."""
    async with serving(tmp_path, num_runtimes=1) as (fleet, _), aiohttp.ClientSession() as session:
        port = fleet.http.address.rpartition(":")[2]
        statuses = []
        good, bad = ("localhost", "127.0.0.1", "[::1]"), ("evil.example", "", "[", "a b")
        for host in (*good, *bad, "evil.example:80"):
            name = f"{host}:{port}" if host and ":80" not in host else host
            url = f"http://{fleet.http.address}/api/fleet"
            async with session.get(url, headers={"Host": name}) as response:
                statuses.append(response.status)
    assert statuses == [200] * 3 + [400] * 5
