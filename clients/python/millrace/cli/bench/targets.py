"""The servers that can be put under load: Millrace over gRPC, and anything that speaks OpenAI's HTTP."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import cycle
from typing import TYPE_CHECKING, Any

from millrace.aio import AsyncClient
from millrace.cli.bench.driver import RequestFailed, Target
from millrace.cli.bench.timeline import Timeline
from millrace.cli.connecting import async_client
from millrace.cli.failures import USAGE, CommandFailed
from millrace.errors import MillraceError
from millrace.retries import Retries
from millrace.session import Session

if TYPE_CHECKING:
    from ssl import SSLContext

    from aiohttp import ClientResponse, ClientSession

# Half of the longest line that can be read.
_READ_BYTES = 1 << 20
# How long a server may take to be reached, and to name its models.
_ANSWER_S = 30.0


class GrpcTarget:
    """A runtime or a gateway, over its own protocol.

    Args:
        sessions: calls that requests share, in turn; none: each has a call of its own.
        model: a deployment or model of a gateway; "": any.
    """

    def __init__(self, client: AsyncClient, sessions: list[Session], model: str) -> None:
        self._client, self._model = client, model
        self._sessions = cycle(sessions) if sessions else None

    async def send(self, prompt: list[int], timeline: Timeline) -> None:
        """As `Target.send`."""
        place = self._client if self._sessions is None else next(self._sessions)
        now_s = asyncio.get_running_loop().time
        stream = place.generate(
            prompt,
            max_new_tokens=timeline.planned.output_tokens,
            ignore_end_tokens=True,
            model=self._model,
        )
        try:
            async for chunk in stream:
                if chunk.token_ids:
                    timeline.arrivals.append((now_s(), len(chunk.token_ids)))
        except MillraceError as error:
            raise RequestFailed(error.reason, str(error), error.retry_after_s) from None


class OpenAiTarget:
    """A server of OpenAI's /v1/completions, streamed; prompts are token ids.

    Answers are asked to be as long as planned by `ignore_eos`, which is not OpenAI's: a server that
    refuses the field is asked without it, and its answers end where they end. A message counts as a
    token until the server's usage says how many there were: servers that join tokens into one
    message have gaps between messages, not tokens.
    """

    def __init__(self, session: "ClientSession", url: str, model: str) -> None:
        self._session, self._url, self._model = session, f"{url}/completions", model
        self._takes_ignore_eos = True

    async def send(self, prompt: list[int], timeline: Timeline) -> None:
        """As `Target.send`."""
        from aiohttp import ClientError

        try:
            try:
                await self._ask(prompt, timeline)
            except RequestFailed as failed:
                if not (failed.reason.startswith("HTTP_4") and "ignore_eos" in str(failed)):
                    raise
                self._takes_ignore_eos = False
                await self._ask(prompt, timeline)
        except ClientError as error:
            reason = "CONNECTION_LOST" if timeline.arrivals else "UNREACHABLE"
            raise RequestFailed(reason, str(error) or type(error).__name__) from None
        except ValueError as error:
            raise RequestFailed("NOT_OPENAI", f"The answer makes no sense: {error}") from None

    async def _ask(self, prompt: list[int], timeline: Timeline) -> None:
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": timeline.planned.output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._takes_ignore_eos:
            body["ignore_eos"] = True
        async with self._session.post(self._url, json=body) as response:
            if response.status != 200:
                raise await _refusal(response)
            await _read(response, timeline)


@asynccontextmanager
async def grpc_target(address: str, calls: int, model: str) -> AsyncIterator[tuple[Target, str]]:
    """The runtime or gateway at `address`, and the name of what it serves.

    Args:
        calls: gRPC calls that the generations share; 0: each has its own.
    Raises:
        MillraceError: it does not answer.
    """
    async with AsyncExitStack() as stack:
        # A request that waits for another try would not be a measurement.
        client = await stack.enter_async_context(async_client(address, Retries(max_attempts=1)))
        served = (await client.get_status()).engine.model
        sessions = [await stack.enter_async_context(client.session()) for _ in range(calls)]
        yield GrpcTarget(client, sessions, model), model or served


@asynccontextmanager
async def openai_target(
    url: str,
    api_key: str,
    model: str,
    tls: "SSLContext | None" = None,
    answer_s: float = _ANSWER_S,
) -> AsyncIterator[tuple[Target, str]]:
    """The server whose API is at `url` (`http://host:port/v1`), and the model that is asked.

    Args:
        model: "": the first that it names.
        tls: of an https server; None: one whose CA the system knows.
        answer_s: in which it is to be reached, and to name its models.
    Raises:
        CommandFailed: it does not answer by then, or names no model.
    """
    from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector

    url = url.rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise CommandFailed(f"{url!r} is not of the form http://host:port/v1", USAGE)
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    async with ClientSession(
        connector=TCPConnector(limit=0, ssl=tls or True),
        timeout=ClientTimeout(total=None, sock_connect=answer_s),
        headers=headers,
        read_bufsize=_READ_BYTES,
    ) as session:
        try:
            async with asyncio.timeout(answer_s):
                model = model or await _first_model(session, url)
        except TimeoutError:
            raise CommandFailed(f"{url}/models gives no answer in {answer_s:g} s") from None
        except (ClientError, RequestFailed, ValueError) as error:
            raise CommandFailed(f"{url}/models does not name a model: {error}") from None
        yield OpenAiTarget(session, url, model), model


async def _first_model(session: "ClientSession", url: str) -> str:
    async with session.get(f"{url}/models") as response:
        if response.status != 200:
            raise await _refusal(response)
        models = (await response.json(content_type=None)).get("data") or [{}]
        name = models[0].get("id")
        if not isinstance(name, str):
            raise ValueError("its list is empty")
        return name


async def _read(response: "ClientResponse", timeline: Timeline) -> None:
    """Takes server-sent events to the last one."""
    now_s = asyncio.get_running_loop().time
    async for line in response.content:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        event: dict[str, Any] = json.loads(data)
        if "error" in event:
            raise _failure(event["error"], "STREAM_ERROR")
        for choice in event.get("choices") or ():
            # A token may have no text of its own: half a character, say. An end may have no token.
            if choice.get("text") or not choice.get("finish_reason"):
                timeline.arrivals.append((now_s(), 1))
        if usage := event.get("usage"):
            timeline.num_tokens = usage.get("completion_tokens") or 0
    raise RequestFailed("CONNECTION_LOST", "The answer ended without [DONE].")


async def _refusal(response: "ClientResponse") -> RequestFailed:
    text = await response.text()
    try:
        error = json.loads(text)["error"]
    except (ValueError, KeyError, TypeError):
        error = {"message": text[:200]}
    failure = _failure(error, f"HTTP_{response.status}")
    after = response.headers.get("Retry-After", "")
    failure.retry_after_s = float(after) if after.replace(".", "", 1).isdigit() else None
    return failure


def _failure(error: object, kind: str) -> RequestFailed:
    known = error if isinstance(error, dict) else {"message": str(error)}
    code = known.get("code")
    reason = f"{kind} {code}" if isinstance(code, str) and code else kind
    return RequestFailed(reason, str(known.get("message", reason)))
