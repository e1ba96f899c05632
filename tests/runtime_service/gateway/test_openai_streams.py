"""OpenAI's streams in trouble: clients that leave or read slowly, runtimes that are lost, a gateway that drains."""

import asyncio
import json
import random
import socket
from pathlib import Path

import pytest
from openai import (
    APIError,
    APIStatusError,
    InternalServerError,
)

from tests.runtime_service.daemon import ENDLESS, ENDLESS_TOKENS, HANG_S, TOKENIZER, until
from tests.runtime_service.gateway.openai_client import NUM_TOKENS, TEXT, serving
from tests.runtime_service.gateway.running_gateway import kill


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
