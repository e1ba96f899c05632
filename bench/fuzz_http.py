"""The HTTP half of bench/fuzz.py: bodies, paths and headers that OpenAI's API has to stand."""

import asyncio
import json
import random
from collections import Counter

import aiohttp

from bench.fuzz_requests import body, text
from runtime_service.gateway.http.openai_requests import ChatRequest, CompletionRequest

# What a gateway may say; 500 is a mistake of ours, and so is an answer that is none.
STATUSES = {200, 204, 400, 401, 403, 404, 405, 409, 413, 429, 503, 504}
AT_ONCE = 16
CALL_S = 5.0
_KINDS = (("/v1/chat/completions", ChatRequest), ("/v1/completions", CompletionRequest))
_EVENT_IDS = ("cmpl-" + "0" * 32 + ":1", "chatcmpl-" + "f" * 32 + ":0", "x", "1" * 300)


async def fuzz_http(address: str, num_messages: int, draw: random.Random) -> Counter[str]:
    """How often each answer came.

    Raises:
        AssertionError: one of them is not documented.
    """
    answers: Counter[str] = Counter()
    timeout = aiohttp.ClientTimeout(total=CALL_S)
    async with aiohttp.ClientSession(f"http://{address}", timeout=timeout) as session:
        left = num_messages
        while left > 0:
            now = min(AT_ONCE, left)
            left -= now
            answers.update(await asyncio.gather(*(_answer(session, draw) for _ in range(now))))
    return answers


async def _answer(session: aiohttp.ClientSession, draw: random.Random) -> str:
    """The status, or the code of the error, of one request."""
    path, kind = draw.choice(_KINDS)
    data = draw.randbytes(draw.choice((0, 1, 20, 200))) if draw.random() < 0.1 else body(draw, kind)
    method, headers = "POST", {"Content-Type": "application/json"}
    if (chance := draw.random()) < 0.05:
        headers["Last-Event-ID"] = draw.choice(_EVENT_IDS)
        method = draw.choice(("GET", "POST"))
    elif chance < 0.1:
        method, path = "GET", "/v1/models/" + "".join(filter(str.isalnum, text(draw)))
    elif chance < 0.13:
        path = draw.choice(("/v1/embeddings", "/api/fleet", "/" + text(draw).strip("/. \n")))
    if draw.random() < 0.2:
        headers["Accept"] = "text/event-stream"
    try:
        async with session.request(method, path, data=data, headers=headers) as response:
            said = await response.read()
    except TimeoutError:
        return "TIMEOUT"
    assert response.status in STATUSES, f"{method} {path}: {response.status} {said!r} for {data!r}"
    if response.status >= 400:
        error = json.loads(said)["error"]
        assert error["code"] != "internal", f"{method} {path}: {said!r} for {data!r}"
        return str(error["code"] or response.status)
    assert b'"code":"internal"' not in said, f"{method} {path}: {said!r} for {data!r}"
    return str(response.status)
