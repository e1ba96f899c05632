"""A gateway's faces with real daemons: TLS, keys, a CPU engine; one question, the same tokens."""

import asyncio
import signal
import ssl
from pathlib import Path
from typing import Any

import grpc
import pytest
from millrace.aio import AsyncClient
from millrace.fleet.v1 import fleet_pb2, fleet_pb2_grpc
from millrace.kserve.v2 import inference_pb2 as kserve
from millrace.kserve.v2 import inference_pb2_grpc
from openai import (
    AsyncOpenAI,
    AuthenticationError,
    DefaultAsyncHttpxClient,
    InternalServerError,
)

from tests.checkpoints import write_checkpoint
from tests.integration.daemon_process import DaemonProcess
from tests.integration.test_main_job import serving, serving_daemons
from tests.shared.certificates import made_in
from tests.shared.key_files import new_key

pytestmark = pytest.mark.redis

PROMPT, NUM_TOKENS, SEED = "hello the Wörld", 40, 7


def openai_client(gateway: DaemonProcess, certs: Path, key: str) -> AsyncOpenAI:
    """OpenAI's client at the gateway's HTTP address, which it logs."""
    address = gateway.wait_for("http_started")["address"]
    tls = ssl.create_default_context(cafile=certs / "ca.crt")
    return AsyncOpenAI(
        base_url=f"https://{address}/v1",
        api_key=key,
        http_client=DefaultAsyncHttpxClient(verify=tls),
        max_retries=0,
    )


async def over_openai(client: AsyncOpenAI) -> tuple[str, list[str]]:
    """Streamed text and its tokens."""
    stream = await client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=NUM_TOKENS, seed=SEED, temperature=1.0,
        stream=True, logprobs=2, extra_body={"ignore_eos": True},
    )  # fmt: skip
    text, tokens = "", []
    async for chunk in stream:
        text += chunk.choices[0].text
        if (logprobs := chunk.choices[0].logprobs) is not None:
            tokens += logprobs.tokens or []
            for token, best in zip(logprobs.tokens or [], logprobs.top_logprobs or [], strict=True):
                assert token in best
    return text, tokens


async def over_kserve(channel: grpc.aio.Channel, metadata: Any) -> str:
    """The text of one answer."""
    request = kserve.ModelInferRequest(model_name="tiny")
    tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(PROMPT.encode())
    request.parameters["max_tokens"].int64_param = NUM_TOKENS
    request.parameters["seed"].int64_param = SEED
    request.parameters["ignore_eos"].bool_param = True
    stub: Any = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
    response = await stub.ModelInfer(request, metadata=metadata)
    (answer,) = response.raw_output_contents
    return str(answer[4:].decode().removeprefix(PROMPT))


async def has_running(channel: grpc.aio.Channel, metadata: Any) -> None:
    """Returns when the gateway has sent a generation to a runtime."""
    stub: Any = fleet_pb2_grpc.FleetServiceStub(channel)
    async with asyncio.timeout(60):
        while True:
            fleet = await stub.GetFleet(fleet_pb2.GetFleetRequest(), metadata=metadata)
            if any(runtime.generations for runtime in fleet.runtimes):
                return


async def test_all_faces_of_a_secured_gateway_give_the_same_tokens(
    redis_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_checkpoint(tmp_path / "model", "llama")
    certs = made_in(tmp_path / "certs")
    key = new_key(capsys, tmp_path / "keys", "acme")
    credentials = grpc.ssl_channel_credentials((certs / "ca.crt").read_bytes())
    metadata = (("authorization", f"Bearer {key}"),)
    with (
        serving_daemons(redis_url, tmp_path, checkpoint, "fp32") as (_, runtime),
        DaemonProcess(
            "runtime_service.gateway",
            "--listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0", "--metrics-listen", "",
            "--runtimes", runtime.address, "--silent-s", "60", "--api-keys", str(tmp_path / "keys"),
            "--tls-cert", str(certs / "server.crt"), "--tls-key", str(certs / "server.key"),
        ) as gateway,
    ):  # fmt: skip
        async with (
            grpc.aio.secure_channel(gateway.address, credentials) as channel,
            openai_client(gateway, certs, key) as client,
            AsyncClient(runtime=gateway.address, api_key=key, tls_ca=str(certs / "ca.crt")) as ours,
        ):
            await serving(channel)
            expected = await ours.generate(
                PROMPT, max_new_tokens=NUM_TOKENS, seed=SEED, temperature=1.0,
                ignore_end_tokens=True,
            ).wait()  # fmt: skip
            text, tokens = await over_openai(client)
            assert text == expected.text
            assert len(tokens) == NUM_TOKENS
            assert await over_kserve(channel, metadata) == expected.text

            messages: Any = [{"role": "user", "content": PROMPT}]
            chat = await client.chat.completions.create(
                model="tiny", messages=messages, temperature=0, max_tokens=NUM_TOKENS
            )
            greedy = await ours.generate(messages, max_new_tokens=NUM_TOKENS).wait()
            assert chat.choices[0].message.content == greedy.text
            async with openai_client(gateway, certs, "mr_no_no") as stranger:
                with pytest.raises(AuthenticationError):
                    await stranger.models.list()

            # What runs at SIGTERM is finished, what comes is refused, and the process ends.
            runtime.send(signal.SIGSTOP)
            asked = client.completions.create(
                model="tiny", prompt=PROMPT, max_tokens=NUM_TOKENS, seed=SEED, temperature=1.0,
                stream=True, extra_body={"ignore_eos": True},
            )  # fmt: skip
            running = asyncio.create_task(asked)
            await has_running(channel, metadata)
            gateway.send(signal.SIGTERM)
            await asyncio.to_thread(gateway.wait_for, "draining_started")
            with pytest.raises(InternalServerError) as refused:
                await client.models.list()
            assert refused.value.status_code == 503
            runtime.send(signal.SIGCONT)
            chunks = [chunk.choices[0] async for chunk in await running]
            assert "".join(chunk.text for chunk in chunks) == expected.text
            assert chunks[-1].finish_reason == "length"
            assert await asyncio.to_thread(gateway.process.wait, 60) == 0
