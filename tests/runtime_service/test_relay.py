"""Relays: what clients see through them is what the daemon says, and it sees few calls."""

import asyncio
import os
import signal
import socket
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2
from grpc_status import rpc_status
from millrace.runtime.v1 import runtime_pb2 as pb
from millrace.runtime.v1 import runtime_pb2_grpc

from runtime_service.relay.joined_calls import Caller, JoinedCalls, RelayedGeneration
from runtime_service.relay.proxy import Proxy
from runtime_service.relay.relays import Relays
from shared.errors import from_status, reason_of
from shared.security import ServerSecurity
from shared.settings import SettingsError
from tests.runtime_service.daemon import (
    ENDLESS,
    ENDLESS_TOKENS,
    Daemon,
    rest_of,
    running_daemon,
    start_of,
    until,
)
from tests.runtime_service.echo_engine import VOCAB_SIZE
from tests.runtime_service.gateway.running_gateway import Unsendable, kill, running_fleet

OWN_STREAM = "/millrace.runtime.v1.RuntimeService/GenerateStream"


def channel_of(daemon: Daemon) -> grpc.aio.Channel:
    """A connection of its own, which the kernel gives to any of the relays."""
    return grpc.aio.insecure_channel(
        daemon.server.address, options=[("grpc.use_local_subchannel_pool", 1)]
    )


async def stream(stub: Any, prompt: list[int], **fields: Any) -> list[pb.Event]:
    """All events of a generation on a call of its own."""
    request = pb.GenerateStreamRequest(start=start_of(prompt, **fields))
    return [event async for message in stub.GenerateStream(request) for event in message.events]


async def refusal(stub: Any, prompt: list[int], **fields: Any) -> Any:
    """The error that such a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await stream(stub, prompt, **fields)
    status = rpc_status.from_call(failed.value)
    assert status is not None, f"no details: {failed.value}"
    return from_status(status)


async def test_streams_of_many_connections_reach_the_daemon_on_a_call_a_relay(
    tmp_path: Path,
) -> None:
    async with running_daemon(tmp_path, step_s=0.005, relays=2) as daemon:

        async def check(number: int) -> None:
            async with channel_of(daemon) as channel:
                stub = runtime_pb2_grpc.RuntimeServiceStub(channel)
                prompt = [40 + number, 90]
                events = await stream(stub, prompt, request_id=f"mine{number}", max_new_tokens=40)
            assert {event.request_id for event in events} == {f"mine{number}"}
            assert events[0].HasField("started")
            assert [t for event in events for t in event.tokens.token_ids] == prompt * 20
            assert events[-1].finished.usage.generated_tokens == 40

        await asyncio.gather(*map(check, range(32)))
        calls = {
            rpc: daemon.registry.get_sample_value("millrace_rpcs_running", {"rpc": rpc})
            for rpc in ("Generate", "GenerateStream")
        }
        assert calls["GenerateStream"] is None
        # One relay may have had them all: the kernel draws lots.
        assert calls["Generate"] in (1, 2)


async def test_errors_pass_with_their_details(tmp_path: Path) -> None:
    async with running_daemon(tmp_path, relays=1) as daemon:
        wrong = await refusal(daemon.stub, [VOCAB_SIZE])
        assert (wrong.reason, wrong.fields["field"]) == ("INVALID_FIELD", "start.token_ids.ids")
        assert (await refusal(daemon.stub, [40], model="other")).reason == "MODEL_NOT_SERVED"
        raw = daemon.channel.unary_stream(OWN_STREAM)
        for data in (b"\xff", pb.GenerateStreamRequest().SerializeToString() + b"\xfa\x07\x01x"):
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await raw(data).read()
            status = rpc_status.from_call(failed.value)
            assert status is not None
            assert reason_of(status) == "INVALID_FIELD"
        # Nothing of it reached another generation's call.
        assert (await stream(daemon.stub, [40], max_new_tokens=3))[-1].HasField("finished")


async def test_deadlines_and_lost_clients_end_what_they_started(tmp_path: Path) -> None:
    async with running_daemon(tmp_path, step_s=0.02, relays=1, **ENDLESS) as daemon:
        late = start_of([40], max_new_tokens=ENDLESS_TOKENS)
        late.timeout.FromMilliseconds(100)
        call = daemon.stub.GenerateStream(pb.GenerateStreamRequest(start=late))
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await rest_of(call)
        assert failed.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await daemon.freed()
        request = pb.GenerateStreamRequest(start=start_of([40], max_new_tokens=ENDLESS_TOKENS))
        cancelled, left = daemon.stub.GenerateStream(request), daemon.stub.Generate()
        await cancelled.read()
        await left.write(pb.GenerateRequest(start=request.start))
        await left.read()
        cancelled.cancel()
        left.cancel()
        await daemon.freed()


async def test_daemon_that_is_gone_ends_streams_with_an_error(tmp_path: Path) -> None:
    async with running_daemon(tmp_path, step_s=0.02, relays=1, **ENDLESS) as daemon:
        request = pb.GenerateStreamRequest(start=start_of([40], max_new_tokens=ENDLESS_TOKENS))
        call = daemon.stub.GenerateStream(request)
        await call.read()
        await daemon.server.grpc.stop(0)
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await rest_of(call)
        status = rpc_status.from_call(failed.value)
        assert status is not None
        assert reason_of(status) == "ENGINE_LOST"


async def test_command_that_cannot_be_sent_ends_what_runs_on_its_call(tmp_path: Path) -> None:
    """Nothing would reach the daemon any more, and nobody would know."""
    async with running_daemon(tmp_path, step_s=0.005, **ENDLESS) as daemon:
        joined = JoinedCalls(daemon.channel).of(Caller(()))
        call = joined.open_call()
        generation = call.start(start_of([40], request_id="a", max_new_tokens=ENDLESS_TOKENS))
        await until(lambda: generation.num_unread_tokens > 3)
        joined._outbox = Unsendable()
        joined.send(pb.GenerateRequest())
        await until(lambda: generation.error is not None)
        assert generation.error is not None
        assert generation.error.reason == "ENGINE_LOST"
        await daemon.freed()


async def test_other_services_pass_as_they_are(tmp_path: Path) -> None:
    async with running_daemon(tmp_path, relays=1) as daemon:
        async for answer in daemon.health():
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                break
        status = await daemon.stub.GetStatus(pb.GetStatusRequest())
        assert status.engine.model == "echo"
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await daemon.channel.unary_unary("/millrace.no.Service/Method")(b"")
        assert failed.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_relay_that_died_is_replaced(tmp_path: Path) -> None:
    relays = Relays(2, 1 << 20, ServerSecurity(), "critical")
    address = await relays.open("127.0.0.1:0")
    try:
        doomed, other = sorted(relays.pids)
        os.kill(doomed, signal.SIGKILL)
        await until(lambda: doomed not in relays.pids and len(relays.pids) == 2)
        assert other in relays.pids
    finally:
        await relays.close()
    assert not any(psutil.pid_exists(pid) for pid in (doomed, other))
    with socket.socket() as free:  # it is nobody's now
        host, _, port = address.partition(":")
        free.bind((host, int(port)))


async def test_address_of_somebody_else_is_refused_at_the_start() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        relays = Relays(1, 1 << 20, ServerSecurity())
        with pytest.raises(SettingsError, match="cannot listen on"):
            await relays.open(f"127.0.0.1:{taken.getsockname()[1]}")
    await relays.close()


def test_reader_that_is_behind_has_its_tokens_joined_a_sample() -> None:
    class Link:
        def forget(self, name: str) -> None:
            pass

    generation = RelayedGeneration("r", Link(), lambda _: None, lambda _: None)  # type: ignore[arg-type]
    for number in range(6):
        event = pb.Event(request_id="7")
        event.tokens.sample_index = int(number == 3)
        event.tokens.token_ids.append(number)
        event.tokens.text = str(number)
        generation.gained(event)
    assert generation.num_unread_tokens == 6
    events = list(generation.take_events())
    assert [(e.tokens.sample_index, e.tokens.text) for e in events] == [
        (0, "012"),
        (1, "3"),
        (0, "45"),
    ]
    assert {event.request_id for event in events} == {"r"}
    assert generation.num_unread_tokens == 0


async def test_gateway_has_relays_too_and_moves_their_streams(tmp_path: Path) -> None:
    async with running_fleet(tmp_path, 2, step_s=0.01, gateway_relays=1) as fleet:
        request = pb.GenerateStreamRequest(start=start_of([40, 41], max_new_tokens=60))
        call = fleet.stub.GenerateStream(request)
        await call.read()
        await kill(fleet.busiest())
        events = await rest_of(call)
        assert events[-1].finished.usage.generated_tokens == 60


async def test_relays_that_are_closed_while_they_start_leave_no_process() -> None:
    relays = Relays(1, 1 << 20, ServerSecurity(), "critical")
    opening = asyncio.create_task(relays.open("127.0.0.1:0"))
    for _ in range(2):  # turns of the loop: its task begins, and that of the relay
        await asyncio.sleep(0)
    (pid,) = relays.pids
    await relays.close()
    assert not relays.pids
    assert not psutil.pid_exists(pid)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening


class _GoneClient:
    """A context of a client that reads nothing any more."""

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def peer_identities(self) -> tuple[()]:
        return ()

    async def write(self, data: bytes) -> None:
        raise ConnectionError


async def test_stream_that_cannot_be_passed_on_ends_at_once(tmp_path: Path) -> None:
    """Not when its generator is collected: whoever holds the error holds that too."""
    async with running_daemon(tmp_path, step_s=0.002, **ENDLESS) as daemon:
        proxy = Proxy(daemon.channel, names_callers=False)
        start = start_of([40], request_id="a", max_new_tokens=ENDLESS_TOKENS)
        data = pb.GenerateStreamRequest(start=start).SerializeToString()
        with pytest.raises(ConnectionError) as failed:
            await proxy._own_stream(data, _GoneClient())  # type: ignore[arg-type]
        await daemon.freed()
        del failed
