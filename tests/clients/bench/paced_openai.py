"""A server of OpenAI's completions that streams tokens at a fixed pace, for tests of its clients."""

import asyncio
import json
from ssl import SSLContext
from typing import Any

from aiohttp import web


class PacedOpenAi:
    """Streams `max_tokens` tokens each; an async context manager.

    Args:
        first_s, token_s: before the first token, and between tokens.
        refused: every so manieth request gets a 429; 0: none.
        breaks_off: answers end without their end.
        is_strict: fields that are not OpenAI's are refused.
        tls: speaks https by it.
    """

    def __init__(
        self,
        first_s: float,
        token_s: float,
        refused: int = 0,
        *,
        breaks_off: bool = False,
        is_strict: bool = False,
        tls: SSLContext | None = None,
    ) -> None:
        self.first_s, self.token_s, self.refused = first_s, token_s, refused
        self.breaks_off, self.is_strict, self._tls = breaks_off, is_strict, tls
        self.asked: list[dict[str, Any]] = []
        self.is_busy = asyncio.Event()  # set from the 50th request on
        self.keys: set[str] = set()
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._complete)
        self._runner = web.AppRunner(app)
        self.url = ""

    async def __aenter__(self) -> "PacedOpenAi":
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=self._tls)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"{'https' if self._tls else 'http'}://{host}:{port}/v1"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "paced"}]})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked.append(body)
        if len(self.asked) >= 50:
            self.is_busy.set()
        self.keys.add(request.headers.get("Authorization", ""))
        if self.is_strict and "ignore_eos" in body:
            error = {"message": "ignore_eos: is unknown", "code": "INVALID_FIELD"}
            return web.json_response({"error": error}, status=400)
        if self.refused and len(self.asked) % self.refused == 0:
            error = {"message": "Too much waits.", "type": "overloaded", "code": "QUEUE_FULL"}
            return web.json_response({"error": error}, status=429, headers={"Retry-After": "0.01"})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await asyncio.sleep(self.first_s)
        for index in range(body["max_tokens"]):
            if index:
                await asyncio.sleep(self.token_s)
            is_last = index == body["max_tokens"] - 1
            choice = {"index": 0, "text": " x", "finish_reason": "length" if is_last else None}
            await self._send(response, {"choices": [choice]})
        if self.breaks_off:
            return response
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
        await self._send(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response

    @staticmethod
    async def _send(response: web.StreamResponse, event: dict[str, Any]) -> None:
        await response.write(f"data: {json.dumps(event)}\n\n".encode())
