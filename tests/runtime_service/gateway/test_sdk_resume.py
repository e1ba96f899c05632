"""The SDK behind a network that breaks, before a real gateway: its streams go on."""

import asyncio
from pathlib import Path

import millrace
import pytest

from tests.clients.relay import Relay
from tests.runtime_service.gateway.running_gateway import RunningGateway, running_fleet

TOKENS = [40, 41]
TOTAL = 200


async def read_with_losses(relay: Relay, stream: millrace.AsyncStream) -> list[int]:
    """All tokens of a stream whose connection is lost after each further fifty."""
    seen: list[int] = []
    next_loss = 50
    async for chunk in stream:
        seen += chunk.token_ids
        if len(seen) >= next_loss:
            next_loss += 50
            relay.lose()
    return seen


def relay_to(fleet: RunningGateway) -> Relay:
    return Relay(int(fleet.server.address.rpartition(":")[2]))


@pytest.mark.parametrize("is_session", [False, True], ids=["own call", "session"])
async def test_stream_loses_and_repeats_no_token_when_its_connection_breaks(
    tmp_path: Path, is_session: bool
) -> None:
    async with running_fleet(tmp_path, step_s=0.004) as fleet:
        relay = relay_to(fleet)
        async with (
            millrace.AsyncClient(runtime=f"127.0.0.1:{relay.port}") as client,
            client.session() as session,
        ):
            asker = session if is_session else client
            stream = asker.generate(TOKENS, max_new_tokens=TOTAL)
            seen = await asyncio.wait_for(read_with_losses(relay, stream), 60)
        relay.close()
        assert 2 <= fleet.sample("resumed_generations_total") <= stream.num_resumes
    assert seen == TOKENS * (TOTAL // 2)
    assert stream.result.num_resumes == stream.num_resumes
    assert stream.result.generated_tokens == TOTAL
