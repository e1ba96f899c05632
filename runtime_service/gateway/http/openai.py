"""The endpoints of OpenAI's API: decode, one call of the gateway, encode.

What they start are the generations that gRPC starts: routed, resumed elsewhere and counted alike.
"""

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import aclosing

import msgspec
from aiohttp import web
from millrace.runtime.v1 import runtime_pb2 as pb

from runtime_service.gateway.fleet import Fleet
from runtime_service.gateway.gateway import Gateway
from runtime_service.gateway.http.failures import error_body
from runtime_service.gateway.http.openai_answers import Answer, ChatShape, CompletionShape, Json
from runtime_service.gateway.http.openai_requests import (
    ChatRequest,
    CompletionRequest,
    parse,
    starts_of_chat,
    starts_of_completion,
)
from runtime_service.gateway.http.server import STREAM_ERROR, Route, body_of, open_stream
from runtime_service.gateway.runtime_link import RuntimeLink
from runtime_service.generate_calls import generate_all
from shared.auth import caller
from shared.errors import InvalidField, MillraceError, NoEngine

_RUNTIME = "/millrace.runtime.v1.RuntimeService/"
_GENERATE, _STATUS = _RUNTIME + "GenerateStream", _RUNTIME + "GetStatus"

_encode = msgspec.json.Encoder().encode


class OpenAiApi:
    """Serves `gateway` to OpenAI's clients; `fleet` knows what models there are."""

    def __init__(self, gateway: Gateway, fleet: Fleet) -> None:
        self._gateway, self._fleet = gateway, fleet

    def routes(self) -> tuple[Route, ...]:
        """What it answers."""
        return (
            Route("POST", "/v1/chat/completions", self.chat, _GENERATE),
            Route("POST", "/v1/completions", self.complete, _GENERATE),
            Route("POST", "/v1/embeddings", self.embed, _GENERATE),
            Route("GET", "/v1/models", self.list_models, _STATUS),
            Route("GET", "/v1/models/{model:.+}", self.get_model, _STATUS),
        )

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """The model's next turn of a conversation."""
        asked = parse(await body_of(request), ChatRequest)
        return await self._answer(request, asked, starts_of_chat(asked), ChatShape())

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """How texts go on."""
        asked = parse(await body_of(request), CompletionRequest)
        return await self._answer(request, asked, starts_of_completion(asked), CompletionShape())

    async def embed(self, request: web.Request) -> web.StreamResponse:
        """Refused: engines here generate, and give no embeddings."""
        raise InvalidField(field="model", problem="no model here gives embeddings")

    async def list_models(self, request: web.Request) -> web.StreamResponse:
        """What a request may name as its model."""
        found = [_model(name, link) for name, link in self._fleet.models().items()]
        return _json({"object": "list", "data": found})

    async def get_model(self, request: web.Request) -> web.StreamResponse:
        """One of them."""
        name = request.match_info["model"]
        self._fleet.check_model(name)
        link = self._fleet.models().get(name)
        if link is None:
            raise NoEngine(wanted=name)
        return _json(_model(name, link))

    async def _answer(
        self,
        request: web.Request,
        asked: ChatRequest | CompletionRequest,
        starts: Sequence[pb.StartGeneration],
        shape: ChatShape | CompletionShape,
    ) -> web.StreamResponse:
        self._fleet.check_model(asked.model)
        options = asked.stream_options
        has_usage = options is not None and options.include_usage
        model = asked.model or next(iter(self._fleet.models()), "")
        answer = Answer(shape, model, asked.n or 1, has_usage)
        async with aclosing(generate_all(self._gateway, starts, caller())) as events:
            if asked.stream:
                return await _stream(request, answer, events)
            async for some in events:
                answer.take(some)
        return _json(answer.body())


async def _stream(
    request: web.Request, answer: Answer, events: AsyncIterator[list[pb.Event]]
) -> web.StreamResponse:
    """Server-sent events, a write for all that came in a step.

    What fails before the first token still has a status of its own; later it is an event.
    """
    response: web.StreamResponse | None = None
    try:
        async for some in events:
            response = response or await open_stream(request, "text/event-stream; charset=utf-8")
            if chunks := answer.chunks(some):
                await response.write(_sse(chunks))
    except MillraceError as error:
        if response is None:
            raise
        request[STREAM_ERROR] = error
        await response.write(_sse([error_body(error)]))
    else:
        assert response is not None, "a generation has ended without an event"
        await response.write(_sse(answer.last_chunks()) + b"data: [DONE]\n\n")
    await response.write_eof()
    return response


def _sse(chunks: Iterable[Json]) -> bytes:
    return b"".join([b"data: %b\n\n" % _encode(chunk) for chunk in chunks])


def _json(body: Json) -> web.Response:
    return web.Response(body=_encode(body), content_type="application/json")


def _model(name: str, link: RuntimeLink) -> Json:
    return {
        "id": name,
        "object": "model",
        "created": link.status.engine.create_time.seconds,
        "owned_by": "millrace",
        "max_model_len": link.status.limits.max_sequence_tokens,
    }
