"""The SDK behind a network that breaks, before a real gateway: its streams go on."""

from pathlib import Path

import millrace
import pytest

from tests.clients.relay import Relay
from tests.runtime_service.daemon import ENDLESS, ENDLESS_TOKENS
from tests.runtime_service.gateway.running_gateway import RunningGateway, running_fleet

TOKENS = [40, 41]
NUM_RESUMES = 3


async def read_with_losses(relay: Relay, stream: millrace.AsyncStream) -> list[int]:
    """Tokens of a stream without an end, whose connection is lost after each further fifty."""
    seen: list[int] = []
    next_loss = 50
    async for chunk in stream:
        seen += chunk.token_ids
        if len(seen) >= next_loss:
            if stream.num_resumes >= NUM_RESUMES:
                break
            next_loss = len(seen) + 50
            relay.lose()
    return seen


def relay_to(fleet: RunningGateway) -> Relay:
    return Relay(int(fleet.server.address.rpartition(":")[2]))


@pytest.mark.parametrize("is_session", [False, True], ids=["own call", "session"])
async def test_stream_loses_and_repeats_no_token_when_its_connection_breaks(
    tmp_path: Path, is_session: bool
) -> None:
    async with running_fleet(tmp_path, step_s=0.004, **ENDLESS) as fleet:
        relay = relay_to(fleet)
        async with (
            millrace.AsyncClient(runtime=f"127.0.0.1:{relay.port}") as client,
            client.session() as session,
        ):
            asker = session if is_session else client
            async with asker.generate(TOKENS, max_new_tokens=ENDLESS_TOKENS) as stream:
                seen = await read_with_losses(relay, stream)
        relay.close()
        assert NUM_RESUMES <= fleet.sample("resumed_generations_total") <= stream.num_resumes
    assert seen == (TOKENS * len(seen))[: len(seen)]
    assert len(seen) > 50 * NUM_RESUMES
