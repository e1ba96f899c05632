"""The endpoints of OpenAI's API: decode, one call of the gateway, encode.

What they start are the generations that gRPC starts: routed, resumed elsewhere and counted alike.
"""

from collections.abc import Sequence
from contextlib import aclosing

import msgspec
from aiohttp import web
from millrace.runtime.v1 import runtime_pb2 as pb

from runtime_service.gateway.fleet import Fleet
from runtime_service.gateway.gateway import Gateway
from runtime_service.gateway.http.event_stream import (
    EVENT_STREAM,
    LAST_EVENT_ID,
    EventStream,
    parse_event_id,
)
from runtime_service.gateway.http.failures import error_body
from runtime_service.gateway.http.openai_answers import Answer, Usage
from runtime_service.gateway.http.openai_requests import (
    ChatRequest,
    CompletionRequest,
    parse,
    starts_of_chat,
    starts_of_completion,
)
from runtime_service.gateway.http.openai_shapes import ChatShape, CompletionShape, Json, Shape
from runtime_service.gateway.http.server import STREAM_ERROR, Route, body_of, open_stream
from runtime_service.gateway.kept import Kept
from runtime_service.gateway.routed_generation import RoutedGeneration
from runtime_service.gateway.runtime_link import RuntimeLink
from runtime_service.generate_calls import generate_all
from shared.auth import caller
from shared.errors import InvalidField, MillraceError, NoEngine

_RUNTIME = "/millrace.runtime.v1.RuntimeService/"
_GENERATE, _STATUS = _RUNTIME + "GenerateStream", _RUNTIME + "GetStatus"
_CONTENT_TYPE = f"{EVENT_STREAM}; charset=utf-8"

_encode = msgspec.json.Encoder().encode


class OpenAiApi:
    """Serves `gateway` to OpenAI's clients; `fleet` knows what models there are."""

    def __init__(self, gateway: Gateway, fleet: Fleet) -> None:
        self._gateway, self._fleet = gateway, fleet
        self._kept = Kept[EventStream](gateway.keep_s)

    def routes(self) -> tuple[Route, ...]:
        """What it answers."""
        return (
            Route("POST", "/v1/chat/completions", self.chat, _GENERATE),
            Route("GET", "/v1/chat/completions", self.chat, _GENERATE),
            Route("POST", "/v1/completions", self.complete, _GENERATE),
            Route("GET", "/v1/completions", self.complete, _GENERATE),
            Route("POST", "/v1/embeddings", self.embed, _GENERATE),
            Route("GET", "/v1/models", self.list_models, _STATUS),
            Route("GET", "/v1/models/{model:.+}", self.get_model, _STATUS),
        )

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """The model's next turn of a conversation, or the rest of it."""
        if request.method == "GET" or request.headers.get(LAST_EVENT_ID):
            return await self._go_on(request, ChatShape())
        asked = parse(await body_of(request), ChatRequest)
        return await self._answer(request, asked, starts_of_chat(asked), ChatShape())

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """How texts go on, or the rest of it."""
        if request.method == "GET" or request.headers.get(LAST_EVENT_ID):
            return await self._go_on(request, CompletionShape())
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
        shape: Shape,
    ) -> web.StreamResponse:
        self._fleet.check_model(asked.model)
        options = asked.stream_options
        usage = Usage.NONE
        if options is not None and options.include_usage:
            usage = Usage.ALWAYS if options.continuous_usage_stats else Usage.AT_END
        model = asked.model or next(iter(self._fleet.models()), "")
        answer = Answer(shape, model, len(starts), asked.n or 1, usage)
        if asked.stream:
            has_ids = EVENT_STREAM in request.headers.get("Accept", "")
            stream = EventStream(answer, caller().tenant, has_ids=has_ids)
            return await self._stream(request, stream, starts)
        async with aclosing(generate_all(self._gateway, starts, caller())) as events:
            async for some in events:
                answer.take(some)
        return _json(answer.body())

    async def _go_on(self, request: web.Request, shape: Shape) -> web.StreamResponse:
        """The rest of a stream, after the event that the client had last."""
        last_id = request.headers.get(LAST_EVENT_ID, "")
        if not last_id:
            problem = "must be set: GET goes on with a stream, and POST begins one"
            raise InvalidField(field=LAST_EVENT_ID, problem=problem)
        name, number = parse_event_id(last_id, shape.id_prefix)
        old = self._kept.find(name, caller().tenant)
        stream = old.after(number)
        if stream.is_told:
            # By which servers of events say that there is nothing to come back for.
            return web.Response(status=204)
        # What it still holds of the tenant's quota is what this goes on with.
        old.supersede()
        await old.has_ended.wait()
        return await self._stream(request, stream, stream.resumptions())

    async def _stream(
        self,
        request: web.Request,
        stream: EventStream,
        commands: Sequence[pb.StartGeneration | pb.ResumeGeneration],
    ) -> web.StreamResponse:
        """Server-sent events, a write for all that came in a step.

        What fails before the first token still has a status of its own; later it is an event.
        """
        response: web.StreamResponse | None = None

        def on_begun(generations: list[RoutedGeneration]) -> None:
            stream.begun(generations)
            if stream.has_ids:
                self._kept.add(stream)

        stream.transport = request.transport
        try:
            events = generate_all(self._gateway, commands, caller(), on_begun)
            async with aclosing(events):
                async for some in events:
                    if stream.is_superseded:
                        break
                    response = response or await open_stream(request, _CONTENT_TYPE)
                    if chunks := stream.answer.chunks(some):
                        await response.write(stream.encode(chunks))
            if stream.is_superseded or not stream.answer.is_complete:
                # Generations that go on elsewhere end without a word. Who reads here, if anybody,
                # must not take that for the end.
                stream.supersede()
                raise ConnectionResetError("its client goes on with it elsewhere")
            response = response or await open_stream(request, _CONTENT_TYPE)
            await response.write(stream.encode_end())
        except MillraceError as error:
            if response is None:
                raise
            request[STREAM_ERROR] = error
            # Without an id: who comes back goes on after what came before it.
            await response.write(b"data: %b\n\n" % _encode(error_body(error)))
        finally:
            stream.transport = None
            stream.has_ended.set()
            if stream.has_ids:
                self._kept.ended(stream)
        await response.write_eof()
        return response


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
