"""OpenAI's own Python client, at a gateway in front of runtimes that echo."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from openai import (
    AsyncOpenAI,
)

from tests.runtime_service.daemon import HANG_S, TOKENIZER
from tests.runtime_service.gateway.running_gateway import RunningGateway, running_fleet

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
