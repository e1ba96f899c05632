"""Every client, in every language, before a real fleet: a runtime is killed, and its reader sees nothing of it.

What clients do at lost connections and errors is played to them by tests/clients; here nothing is scripted.
"""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest
from millrace.runtime.v1 import runtime_pb2 as pb
from millrace.runtime.v1 import runtime_pb2_grpc

from tests.clients.runners import BUILD_AND_TESTS_TIMEOUT_S, LANGUAGES, Json, Runner
from tests.integration.fleet_processes import FleetClient, FleetProcesses, is_near_tie
from tests.runtime_service.daemon import Seen

pytestmark = [pytest.mark.redis, pytest.mark.timeout(BUILD_AND_TESTS_TIMEOUT_S)]

NUM_TOKENS = 400
NUM_IN_SESSION = 12
# So many tokens more than at the beginning, over all streams: some have begun, and hardly one has ended.
NUM_BEFORE_KILL = 300


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FleetProcesses]:
    with FleetProcesses(tmp_path_factory.mktemp("fleet"), 2, 1) as fleet:
        yield fleet


@pytest.fixture
async def client(fleet: FleetProcesses) -> AsyncIterator[FleetClient]:
    async with grpc.aio.insecure_channel(fleet.gateway.address) as channel:
        client = FleetClient(channel)
        await client.deploy(fleet.checkpoint, len(fleet.runtimes))
        yield client


@pytest.fixture(scope="module", params=LANGUAGES)
def runners(request: pytest.FixtureRequest) -> Iterator[tuple[Runner, Runner]]:
    """Two programs of a language, one for a stream of its own and one for a session."""
    language = LANGUAGES[request.param]
    if missing := language.missing():
        assert not (language.is_required and os.environ.get("CI")), f"CI lacks {missing}"
        pytest.skip(f"the {request.param} client needs {missing}")
    with Runner(language) as own, Runner(language) as shared:
        yield own, shared


def prompt_of(number: int) -> str:
    return f"{number} is"


def generation(number: int) -> Json:
    options = {"max_new_tokens": NUM_TOKENS, "ignore_end_tokens": True, "model": "chat"}
    return {"generate": {"prompt": prompt_of(number), **options}}


async def played(fleet: FleetProcesses, runners: tuple[Runner, Runner]) -> list[Json]:
    """What both saw: the stream of its own, then those of the session."""
    several = [generation(number) for number in range(1, NUM_IN_SESSION + 1)]
    tasks = ([generation(0)], [{"session": several}])
    own, shared = await asyncio.gather(
        *(
            asyncio.to_thread(
                runner.run, {"address": fleet.gateway.address, "options": {}, "do": task}
            )
            for runner, task in zip(runners, tasks, strict=True)
        )
    )
    return [*own, *shared]


async def busiest(client: FleetClient, fleet: FleetProcesses) -> int:
    """Which runtime runs most, once streams have tokens."""
    async with AsyncExitStack() as stack:
        stubs: list[Any] = []
        for runtime in fleet.runtimes:
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(runtime.address))
            stubs.append(runtime_pb2_grpc.RuntimeServiceStub(channel))

        async def loads() -> list[pb.RuntimeLoad]:
            """As they are now: the gateway looks three times a second."""
            asked = (stub.GetStatus(pb.GetStatusRequest()) for stub in stubs)
            return [status.load for status in await asyncio.gather(*asked)]

        wanted = sum(load.generated_tokens for load in await loads()) + NUM_BEFORE_KILL
        async with asyncio.timeout(60):
            found = await loads()
            while sum(load.generated_tokens for load in found) < wanted:
                found = await loads()
        running = [load.running_sequences for load in found]
        return running.index(max(running))


async def test_streams_of_every_client_outlive_their_runtime(
    fleet: FleetProcesses, client: FleetClient, runners: tuple[Runner, Runner]
) -> None:
    undisturbed = await played(fleet, runners)
    playing = asyncio.create_task(played(fleet, runners))
    doomed = await busiest(client, fleet)
    address = fleet.runtimes[doomed].address
    fleet.runtimes[doomed].send(signal.SIGKILL)
    seen = await playing
    fleet.runtimes[doomed] = await asyncio.to_thread(fleet.new_runtime)
    lost = [
        line
        for line in fleet.gateway.lines
        if line.get("event") == "runtime_lost" and line["runtime"] == address
    ]
    assert lost, "nothing ran there any more"
    assert lost[0]["generations"] > 0
    assert len(seen) == len(undisturbed) == NUM_IN_SESSION + 1
    for number, (one, other) in enumerate(zip(seen, undisturbed, strict=True)):
        assert (one["ended"], one["num_resumes"]) == ("finished", 0), one
        assert one["received_tokens"] == [NUM_TOKENS]
        ours, theirs = _sample(one), _sample(other)
        assert ours.text[0] == "".join(one["chunks"])
        if ours.token_ids != theirs.token_ids:
            start = pb.StartGeneration(text=prompt_of(number), model="chat")
            assert await is_near_tie(client.stub, start, ours, theirs), f"{number} differs"
        else:
            assert ours.text == theirs.text


def _sample(result: Json) -> Seen:
    (sample,) = result["samples"]
    return Seen(token_ids={0: sample["token_ids"]}, text={0: sample["text"]})
